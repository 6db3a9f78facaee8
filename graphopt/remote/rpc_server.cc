// A TVM RPC server for devices without Python: rpc_server PORT KEY [ADDRESS]
//
// It speaks the handshake of tvm/rpc/server.py, then hands the socket to TVM's own server loop, each session in a process
// of its own and a folder of its own, which goes when the session ends. It prints "listening PORT" once it does; PORT 0
// takes any that is free. ADDRESS is where it listens, 127.0.0.1 unless given: whoever connects can run any code here.
//
// Needs the headers of tvm_ffi, and libtvm_runtime, libtvm_runtime_extra and libtvm_ffi of the device.

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

namespace ffi = tvm::ffi;

namespace {

constexpr int32_t kMagic = 0xff271;         // the answer to the right key, too
constexpr int32_t kWrongKey = kMagic + 2;   // RPC_CODE_MISMATCH
constexpr int32_t kLongestKey = 1 << 16;

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

// The client says its magic number and "client:KEY ...options"; true where the key is ours.
bool Greet(int socket, const std::string& key) {
  int32_t magic = 0, size = 0;
  if (!Receive(socket, &magic, sizeof magic) || magic != kMagic) return false;
  if (!Receive(socket, &size, sizeof size) || size < 0 || size > kLongestKey) return false;
  std::string theirs(static_cast<size_t>(size), '\0');
  if (!Receive(socket, theirs.data(), theirs.size())) return false;
  bool same = theirs.substr(0, theirs.find(' ')) == "client:" + key;
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
  ffi::Function::GetGlobalRequired("rpc.ServerLoop")(socket);
}

int Session(int socket) {
  char pattern[] = "./rpc-XXXXXX";
  const char* folder = mkdtemp(pattern);
  if (folder == nullptr) {
    perror("cannot make a folder for the session");
    return 1;
  }
  int code = 0;
  try {
    Serve(socket, folder);
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    code = 1;
  }
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
  return code;
}

int Listen(const char* address, int port) {
  int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  sockaddr_in where{};
  where.sin_family = AF_INET;
  where.sin_port = htons(static_cast<uint16_t>(port));
  if (inet_pton(AF_INET, address, &where.sin_addr) != 1) {
    fprintf(stderr, "%s is no IPv4 address\n", address);
    return -1;
  }
  socklen_t size = sizeof where;
  if (bind(listener, reinterpret_cast<sockaddr*>(&where), size) || listen(listener, 8) ||
      getsockname(listener, reinterpret_cast<sockaddr*>(&where), &size)) {
    perror("cannot listen");
    return -1;
  }
  printf("listening %d\n", ntohs(where.sin_port));
  fflush(stdout);
  return listener;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3 || count > 4) {
    fprintf(stderr, "usage: rpc_server PORT KEY [ADDRESS]\n");
    return 2;
  }
  signal(SIGCHLD, SIG_IGN);  // sessions that ended leave nothing behind
  const std::string key = arguments[2];
  int listener = Listen(count > 3 ? arguments[3] : "127.0.0.1", atoi(arguments[1]));
  if (listener < 0) return 1;
  for (;;) {
    int socket = accept(listener, nullptr, nullptr), one = 1;
    if (socket < 0) continue;
    setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (Greet(socket, key) && fork() == 0) {
      close(listener);
      signal(SIGCHLD, SIG_DFL);
      _exit(Session(socket));
    }
    close(socket);
  }
}
