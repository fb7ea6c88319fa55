import Foundation
import Host
import NetLayer

/// A switch of the test's own, on a socket in a folder of its own.
final class TestSwitch {
  let path: String
  private let folder: TemporaryFolder
  private let loop: EventLoop
  private let thread: HostThread
  private let network: VirtualSwitch

  init() throws {
    folder = try TemporaryFolder()
    path = folder.path + "/net"
    let loop = try EventLoop()
    network = VirtualSwitch(on: loop)
    try network.listen(StreamListener(StreamEndpoint("unix:" + path)))
    self.loop = loop
    thread = try HostThread(name: "switch") { loop.run() }
  }

  deinit {
    loop.stop()
    thread.join()
    network.close()
  }
}
