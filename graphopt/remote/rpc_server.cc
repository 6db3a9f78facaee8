// A TVM RPC server for devices without Python:
//
//   rpc_server PORT KEY [--host ADDRESS] [--tracker HOST:PORT] [--advertise ADDRESS]
//
// It speaks the handshake of tvm/rpc/server.py, then hands the socket to TVM's own server loop, each session in a process
// of its own and a folder of its own, which goes when the session ends. It prints "listening PORT" once it does; PORT 0
// takes any that is free. --host is where it listens, 127.0.0.1 unless given: whoever connects can run any code here.
//
// With --tracker it offers itself at TVM's tracker and serves one session at a time, each under a fresh key, as
// tvm/rpc/server.py does. --advertise is the address that clients are told, where the tracker sees another one.
//
// `graphopt.describe_device` says what machine this is, as JSON (see device_description.h).
//
// Needs the headers of tvm_ffi, and libtvm_runtime, libtvm_runtime_extra and libtvm_ffi of the device. Where the device
// has NVIDIA's driver and CUDA's runtime library, it loads libtvm_runtime_cuda, too, and serves the GPU.

#include <arpa/inet.h>
#include <dlfcn.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>

#include "device_description.h"

namespace ffi = tvm::ffi;

namespace {

constexpr int32_t kMagic = 0xff271;         // the answer to the right key, too
constexpr int32_t kWrongKey = kMagic + 2;   // RPC_CODE_MISMATCH
constexpr int32_t kTrackerMagic = 0x2f271;
constexpr int32_t kLongestText = 1 << 20;
constexpr int kPut = 3, kUpdateInfo = 5, kPendingKeys = 7;  // TrackerCode
constexpr int kPingMs = 2000;
constexpr int kUnusedPings = 3;  // a key that a client took and has not used for so long is replaced

bool Receive(int socket, void* data, size_t size) {
  for (char* at = static_cast<char*>(data); size > 0;) {
    ssize_t got = recv(socket, at, size, 0);
    if (got <= 0) return false;
    at += got;
    size -= static_cast<size_t>(got);
  }
  return true;
}

bool Send(int socket, const void* data, size_t size) {
  for (const char* at = static_cast<const char*>(data); size > 0;) {
    ssize_t sent = send(socket, at, size, MSG_NOSIGNAL);
    if (sent <= 0) return false;
    at += sent;
    size -= static_cast<size_t>(sent);
  }
  return true;
}

bool SendText(int socket, const std::string& text) {
  int32_t size = static_cast<int32_t>(text.size());
  return Send(socket, &size, sizeof size) && Send(socket, text.data(), text.size());
}

bool ReceiveText(int socket, std::string* text) {
  int32_t size = 0;
  if (!Receive(socket, &size, sizeof size) || size < 0 || size > kLongestText) return false;
  text->resize(static_cast<size_t>(size));
  return Receive(socket, text->data(), text->size());
}

struct Options {
  int port = 0;
  std::string key, host = "127.0.0.1", tracker_host, tracker_port, advertise;
};

// This server's entry at the tracker: a connection that stays open, and the key that the next client must say.
class Tracker {
 public:
  explicit Tracker(const Options& options) : options_(options) {}
  ~Tracker() { Close(); }

  const std::string& key() const { return key_; }

  void Close() {
    if (socket_ >= 0) close(socket_);
    socket_ = -1;
  }

  // Make sure that the tracker knows of a free server here; false where it cannot be reached.
  bool Offer(int port) {
    if (socket_ < 0 && !Enter(port)) return false;
    key_ = options_.key + ":0." + std::to_string(random_());
    unused_ = 0;
    std::string answer;
    return Ask("[" + std::to_string(kPut) + ", " + Quoted(options_.key) + ", [" + std::to_string(port) + ", " +
                   Quoted(key_) + "], " + Advertised() + "]", &answer);
  }

  // Called while nobody connects: a key that was given out and never used is replaced.
  bool Watch(int port) {
    std::string pending;
    if (socket_ < 0 || !Ask("[" + std::to_string(kPendingKeys) + "]", &pending)) {
      Close();
      return Offer(port);
    }
    unused_ = pending.find(key_) == std::string::npos ? unused_ + 1 : 0;
    return unused_ <= kUnusedPings || Offer(port);
  }

 private:
  bool Enter(int port) {
    addrinfo hints{}, *found = nullptr;
    hints.ai_family = AF_INET;
    hints.ai_socktype = SOCK_STREAM;
    if (getaddrinfo(options_.tracker_host.c_str(), options_.tracker_port.c_str(), &hints, &found)) return false;
    socket_ = socket(found->ai_family, SOCK_STREAM, 0);
    bool there = connect(socket_, found->ai_addr, found->ai_addrlen) == 0;
    freeaddrinfo(found);
    int32_t magic = kTrackerMagic;
    std::string answer;
    if (there && Send(socket_, &magic, sizeof magic) && Receive(socket_, &magic, sizeof magic) &&
        magic == kTrackerMagic &&
        Ask("[" + std::to_string(kUpdateInfo) + ", {\"key\": " + Quoted("server:" + options_.key) + ", \"addr\": [" +
                Advertised() + ", " + std::to_string(port) + "]}]", &answer)) {
      return true;
    }
    Close();
    return false;
  }

  bool Ask(const std::string& question, std::string* answer) {
    if (SendText(socket_, question) && ReceiveText(socket_, answer)) return true;
    Close();
    return false;
  }

  std::string Advertised() const { return options_.advertise.empty() ? "null" : Quoted(options_.advertise); }

  const Options& options_;
  int socket_ = -1;
  std::string key_;
  int unused_ = 0;
  std::mt19937_64 random_{std::random_device{}()};
};

// TVM's part for GPUs, which lies beside this program. It does not start the driver: sessions do, which are forked.
void LoadGpuPart() {
  if (dlopen("libcuda.so.1", RTLD_NOW) == nullptr) return;
  for (const char* library : {"libcudart.so.13", "libtvm_runtime_cuda.so"}) {
    if (dlopen(library, RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      fprintf(stderr, "the GPU is not served: %s\n", dlerror());
      return;
    }
  }
}

// The client says its magic number and "client:KEY ...options"; true where the key is `wanted`. `seconds` is how long
// the session may last, 0 for any time.
bool Greet(int socket, const std::string& wanted, const std::string& key, unsigned* seconds) {
  int32_t magic = 0;
  std::string theirs;
  if (!Receive(socket, &magic, sizeof magic) || magic != kMagic || !ReceiveText(socket, &theirs)) return false;
  size_t limit = theirs.find(" -timeout=");
  *seconds = limit == std::string::npos ? 0 : static_cast<unsigned>(atof(theirs.c_str() + limit + 10) + 1);
  bool same = theirs.substr(0, theirs.find(' ')) == "client:" + wanted;
  int32_t answer = same ? kMagic : kWrongKey;
  return Send(socket, &answer, sizeof answer) && same && SendText(socket, "server:" + key);
}

// What the client uploads lies in `folder`, and is loaded from there.
void Serve(int socket, const std::string& folder) {
  auto inside = [folder](const ffi::String& name) {
    return folder + "/" + std::filesystem::path(std::string(name)).filename().string();
  };
  ffi::Function::SetGlobal(
      "tvm.rpc.server.workpath",
      ffi::Function::FromTyped([inside](ffi::String name) -> ffi::String { return inside(name); }), true);
  ffi::Function::SetGlobal(
      "tvm.rpc.server.load_module",
      ffi::Function::FromTyped([inside](ffi::String name) -> ffi::Module {
        return ffi::Module::LoadFromFile(ffi::String(inside(name)));
      }),
      true);
  ffi::Function::SetGlobal("graphopt.describe_device",
                           ffi::Function::FromTyped([]() -> ffi::String { return DescribeDevice(); }), true);
  ffi::Function::GetGlobalRequired("rpc.ServerLoop")(socket);
}

int Session(int socket, const std::string& folder) {
  try {
    Serve(socket, folder);
    return 0;
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

// A process that outlives the session's own, so that its folder goes however it ends.
void Keep(int socket, unsigned seconds) {
  char pattern[] = "./rpc-XXXXXX";
  const char* folder = mkdtemp(pattern);
  if (folder == nullptr) {
    perror("cannot make a folder for the session");
    return;
  }
  signal(SIGCHLD, SIG_DFL);
  pid_t child = fork();
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // or the tracker's connection, which it inherits, would outlive the server
    if (seconds) alarm(seconds);
    _exit(Session(socket, folder));
  }
  close(socket);
  int status = 0;
  if (child > 0) waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) fprintf(stderr, "a session was ended by signal %d\n", WTERMSIG(status));
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
}

int Listen(const Options& options, int* port) {
  int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  sockaddr_in where{};
  where.sin_family = AF_INET;
  where.sin_port = htons(static_cast<uint16_t>(options.port));
  if (inet_pton(AF_INET, options.host.c_str(), &where.sin_addr) != 1) {
    fprintf(stderr, "%s is no IPv4 address\n", options.host.c_str());
    return -1;
  }
  socklen_t size = sizeof where;
  if (bind(listener, reinterpret_cast<sockaddr*>(&where), size) || listen(listener, 8) ||
      getsockname(listener, reinterpret_cast<sockaddr*>(&where), &size)) {
    perror("cannot listen");
    return -1;
  }
  *port = ntohs(where.sin_port);
  if (ntohl(where.sin_addr.s_addr) >> 24 != 127) {
    fprintf(stderr, "WARNING: whoever can reach %s:%d can run any code on this machine\n", options.host.c_str(), *port);
  }
  printf("listening %d\n", *port);
  fflush(stdout);
  return listener;
}

bool Parse(int count, char** arguments, Options* options) {
  if (count < 3) return false;
  options->port = atoi(arguments[1]);
  options->key = arguments[2];
  for (int i = 3; i + 1 < count; i += 2) {
    const std::string name = arguments[i], value = arguments[i + 1];
    if (name == "--host") {
      options->host = value;
    } else if (name == "--advertise") {
      options->advertise = value;
    } else if (name == "--tracker" && value.rfind(':') != std::string::npos) {
      options->tracker_host = value.substr(0, value.rfind(':'));
      options->tracker_port = value.substr(value.rfind(':') + 1);
    } else {
      return false;
    }
  }
  return count % 2 == 1;
}

// Anybody who knows the key, each session beside the others.
int ServeAll(int listener, const Options& options) {
  signal(SIGCHLD, SIG_IGN);  // sessions that ended leave nothing behind
  for (;;) {
    int socket = accept(listener, nullptr, nullptr), one = 1;
    unsigned seconds = 0;
    if (socket < 0) continue;
    setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (Greet(socket, options.key, options.key, &seconds) && fork() == 0) {
      close(listener);
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      Keep(socket, seconds);
      _exit(0);
    }
    close(socket);
  }
}

// Clients that the tracker sends, one at a time.
int ServeTracked(int listener, int port, const Options& options) {
  Tracker tracker(options);
  if (!tracker.Offer(port)) {
    fprintf(stderr, "no tracker answers at %s:%s\n", options.tracker_host.c_str(), options.tracker_port.c_str());
    return 1;
  }
  for (;;) {
    pollfd waiting{listener, POLLIN, 0};
    if (poll(&waiting, 1, kPingMs) <= 0) {
      tracker.Watch(port);
      continue;
    }
    int socket = accept(listener, nullptr, nullptr), one = 1;
    unsigned seconds = 0;
    if (socket < 0) continue;
    setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (Greet(socket, tracker.key(), options.key, &seconds)) {
      Keep(socket, seconds);
      tracker.Offer(port);
    } else {
      close(socket);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  Options options;
  if (!Parse(count, arguments, &options)) {
    fprintf(stderr, "usage: rpc_server PORT KEY [--host ADDRESS] [--tracker HOST:PORT] [--advertise ADDRESS]\n");
    return 2;
  }
#ifdef __x86_64__
  syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM: AMX's tile registers, where there are any
#endif
  setenv("TVM_THREAD_POOL_SPIN_COUNT", "2000", 0);  // as graphopt's own engine: idle workers sleep
  LoadGpuPart();
  int port = 0, listener = Listen(options, &port);
  if (listener < 0) return 1;
  return options.tracker_host.empty() ? ServeAll(listener, options) : ServeTracked(listener, port, options);
}
