// Runs a model that `graphopt package` packed. C++17, Linux on x86-64 and aarch64; nothing but the standard library here.
//
//   graphopt::Runner model("my_package");               // reads package.json, checks the processor, loads the library
//   float* picture = static_cast<float*>(model.input(0));
//   ... fill the model.inputs()[0].bytes() bytes at `picture` ...
//   model.run();
//   const float* scores = static_cast<const float*>(model.output(0));
//
// The package holds code for one set of shapes: those of inputs() and outputs().
#ifndef GRAPHOPT_RUNNER_H_
#define GRAPHOPT_RUNNER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace graphopt {

// Everything that goes wrong: what() is one plain sentence.
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An input or output: `dtype` is NumPy's name of the element type ("float32", "uint8", ...); elements lie in C order.
struct Tensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;

  size_t count() const;  // elements
  size_t bytes() const;
};

// A loaded model. Movable, not copyable; to be used by one thread at a time. Several runners may live side by side.
class Runner {
 public:
  // `package` is the folder with package.json in it. `threads` work on a run; 0: all processors this process may use.
  //
  // Throws Error where a file is missing, is not whole, or is for another architecture, and where the processor lacks an
  // instruction set that all libraries of the package need: nothing of a library runs before that is known.
  explicit Runner(const std::string& package, int threads = 0);
  ~Runner();
  Runner(Runner&&) noexcept;
  Runner& operator=(Runner&&) noexcept;

  const std::vector<Tensor>& inputs() const;
  const std::vector<Tensor>& outputs() const;
  int threads() const;
  const std::string& library() const;  // the file that was chosen, relative to the package

  // Memory of an input, 64-byte aligned, to be written before run(); it keeps its content from run to run.
  // Throws Error where there is no such input.
  void* input(size_t index);
  void* input(const std::string& name);

  // Computes the outputs. Throws Error where the model fails.
  void run();

  // An output of the last run(); valid until the next one, or until an input is written that it is a view of.
  // Throws Error where there is no such output or nothing was run.
  const void* output(size_t index) const;
  const void* output(const std::string& name) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace graphopt

#endif  // GRAPHOPT_RUNNER_H_
