import Glibc
import Host

/// A server in another process, for as long as a client needs it.
struct ServerProcess {
  private let process: pid_t
  private let socket: String

  /// Starts it, with its output in a file, and waits for its unix socket, ten seconds at most.
  init(_ arguments: [String], socket: String, output: String = "/dev/null") throws(HostError) {
    self.socket = socket
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
    posix_spawn_file_actions_addopen(&actions, 1, output, O_WRONLY | O_CREAT | O_TRUNC, 0o600)
    posix_spawn_file_actions_adddup2(&actions, 1, 2)
    var words: [UnsafeMutablePointer<CChar>?] = arguments.map { strdup($0) }
    defer { for word in words { free(word) } }
    words.append(nil)
    var process = pid_t()
    let code = posix_spawnp(&process, arguments[0], &actions, nil, words, environ)
    guard code == 0 else { throw .path("run", path: arguments[0], errno: code) }
    self.process = process
    for _ in 0..<1000 where access(socket, F_OK) != 0 { usleep(10_000) }
  }

  func end() {
    kill(process, SIGKILL)
    var status: Int32 = 0
    while waitpid(process, &status, 0) < 0, errno == EINTR {}
    unlink(socket)
  }
}
