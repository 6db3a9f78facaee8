"""The only room that imports TVM: importing, blocked layout, fusion, linking."""
