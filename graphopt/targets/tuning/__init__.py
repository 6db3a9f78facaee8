"""Search over the templates' spaces, and the database of what was found."""
