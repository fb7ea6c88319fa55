import BlockLayer
import Foundation
import Host
import Synchronization
import TLS
import TestCertificates
import Testing

@testable import NBD

/// NBD by TLS: our server and our client, with each other and with libnbd's tools and QEMU's.
@Suite(
  .serialized,
  .enabled(
    if: TestCertificates.canBeMade && isInstalled("nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "qemu-nbd"),
    "needs openssl, libnbd-bin and qemu-utils"))
struct NBDTLSTests {
  private let folder: TemporaryFolder
  private let certificates: TestCertificates
  private let image: String

  init() throws {
    folder = try TemporaryFolder()
    certificates = try TestCertificates()
    image = folder.path + "/raw"
    for arguments in [
      ["truncate", "-s", "64M", image],
      ["qemu-io", "-f", "raw", "-c", "write -P 5 1M 9M", "-c", "write -P 6 40M 64k", "-c", "write -P 7 63M 1M", image],
    ] { try #require(try hostTool(arguments).status == 0) }
  }

  /// QEMU's options for a client of a server.
  private func qemu(_ server: TestServer, _ folder: String? = nil) throws -> [String] {
    guard case .tcp(let host, let port) = server.server.endpoint else { return [] }
    return [
      "--object", "tls-creds-x509,id=tls0,endpoint=client,dir=\(folder ?? certificates.path)", "--image-opts",
      "driver=raw,file.driver=nbd,file.host=\(host),file.port=\(port),file.tls-creds=tls0",
    ]
  }

  private func refusals(_ body: (@escaping (NBDServer.Event) -> Void) throws -> Void) throws -> [TLSError] {
    let found = Mutex<[TLSError]>([])
    try body { event in
      if case .refused(let error) = event { found.withLock { $0.append(error) } }
    }
    return found.withLock { $0 }
  }

  private func expect(_ arguments: [String], status: Int32 = 0, says text: String? = nil) throws {
    let result = try hostTool(arguments)
    #expect(
      result.status == status && (status != 0 || !result.output.contains("failed")), "\(arguments) \(result.output)")
    if let text { #expect(result.output.contains(text), "\(result.output)") }
  }

  @Test func othersReadAndWriteOurDisk() throws {
    let server = try TestServer(
      image, format: .raw, in: folder, writable: true, certificates: certificates.path, tcp: true)
    let copy = folder.path + "/copy"
    try expect(["nbdinfo", server.uri], says: "protocol: newstyle-fixed with TLS")
    try expect(["nbdinfo", "--map", server.uri], says: "zero")
    try expect(["nbdcopy", server.uri, copy])
    try expect(["qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", image, copy])
    try expect(["qemu-io", "-c", "write -P 9 3M 32M", "-c", "flush", "-c", "read -P 9 3M 32M"] + qemu(server))
    try expect(
      ["qemu-io", "-c", "aio_write -P 8 0 5M", "-c", "aio_read -P 7 63M 1M", "-c", "aio_flush"] + qemu(server))
    try expect(["qemu-io", "-c", "read -P 8 0 5M", "-c", "write -z 0 1M"] + qemu(server))
    try expect(["nbdcopy", copy, server.uri])
    try server.stop()
    try expect(["qemu-img", "compare", "-f", "raw", "-F", "raw", image, copy])
  }

  @Test func aUnixSocketServesByTLSToo() throws {
    let server = try TestServer(image, format: .raw, in: folder, certificates: certificates.path)
    try expect(["nbdcopy", server.uri, folder.path + "/copy"])
    try expect(["qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", image, folder.path + "/copy"])
    try server.stop()
  }

  /// Everything goes through our client: random requests, many at a time.
  @Test(arguments: [false, true])
  func ourClientReadsAndWrites(isQemu: Bool) throws {
    if isQemu {
      try withQemuNBD(
        ["-f", "raw", "--tls-creds", "tls0", "--object"]
          + ["tls-creds-x509,id=tls0,endpoint=server,dir=\(certificates.path)", image], folder
      ) { uri in
        let path = try #require(uri.split(separator: "=").last)
        try exercise(
          "\(NBDURI(.unix(path: "\(path)"), export: "", tls: .init(certificates: certificates.path, hostName: "localhost")))"
        )
      }
    } else {
      let server = try TestServer(
        image, format: .raw, in: folder, writable: true, certificates: certificates.path, tcp: true)
      try exercise(server.uri)
      try server.stop()
    }
  }

  private func exercise(_ uri: String) throws {
    let chain = try BlockChain(path: uri, format: .raw, access: FileAccess(writable: true), queue: makeIOQueue())
    #expect(chain.top.size == 64 << 20)
    let outstanding = Mutex(0)
    var buffers: [(DiskBuffer, UInt64)] = []
    // Reads and writes at once, each to its own place: both threads of the connection are busy.
    for index in 0..<32 {
      let buffer = DiskBuffer(count: 1 << 20)
      let isWrite = index % 2 == 0
      if isWrite { memset(buffer.start, Int32(index + 1), 1 << 20) }
      let request = BlockRequest(
        isWrite ? .write : .read, offset: UInt64(index % 2 == 0 ? 20 + index : 1 + index % 8) << 20, length: 1 << 20
      ) { error in
        #expect(error == nil)
        outstanding.withLock { $0 -= 1 }
      }
      request.memory.append(buffer.start, 1 << 20)
      outstanding.withLock { $0 += 1 }
      chain.top.submit(request)
      buffers.append((buffer, request.offset))
    }
    chain.queue.run { outstanding.withLock { $0 } == 0 }
    for (index, (buffer, offset)) in buffers.enumerated() {
      if index % 2 == 0 {
        let back = DiskBuffer(count: 1 << 20)
        try chain.top.perform(.read, at: offset, memory: back.bytes, on: chain.queue)
        #expect(memcmp(back.start, buffer.start, 1 << 20) == 0, "\(index)")
      } else {
        #expect(buffer.bytes.allSatisfy { $0 == 5 }, "\(index)")
      }
    }
    try chain.top.perform(.flush, at: 0, length: 0, on: chain.queue)
    try chain.close()
  }

  // MARK: Who may not

  private func failure(_ uri: String) -> String {
    do {
      try BlockChain(path: uri, format: .raw, access: FileAccess(writable: false), queue: makeIOQueue()).close()
      return ""
    } catch {
      return "\(error)"
    }
  }

  @Test func ourClientSaysWhyNot() throws {
    let other = try TestCertificates()
    let server = try TestServer(image, format: .raw, in: folder, certificates: certificates.path, tcp: true)
    let plain = try TestServer(image, format: .raw, in: folder, tcp: true)
    func uri(_ server: TestServer, _ tls: NBDURI.TLS?) -> String {
      "\(NBDURI(server.server.endpoint, export: "", tls: tls))"
    }
    #expect(failure(uri(server, nil)).contains("use nbds:// with tls-certificates"))
    #expect(failure(uri(server, .init())).contains("needs tls-certificates"))
    #expect(failure(uri(server, .init(certificates: "/nowhere"))).contains("cannot read /nowhere/ca-cert.pem"))
    #expect(failure(uri(plain, .init(certificates: certificates.path))).contains("the server has no TLS"))
    #expect(failure(uri(server, .init(certificates: other.path))).contains("no CA of ca-cert.pem has signed it"))
    #expect(
      failure(uri(server, .init(certificates: certificates.path, hostName: "elsewhere"))).contains(
        "not one of elsewhere"))
    try other.copy("ca-cert.pem", from: certificates)
    try other.remove("client-cert.pem", "client-key.pem")
    #expect(failure(uri(server, .init(certificates: other.path))).contains("certificate required"))
    #expect(failure(uri(server, .init(certificates: certificates.path))) == "")
    try server.stop()
    try plain.stop()
  }

  @Test func othersAreTurnedAwayAndTheNextOneIsServed() throws {
    let other = try TestCertificates()
    let found = try refusals { onEvent in
      let server = try TestServer(
        image, format: .raw, in: folder, certificates: certificates.path, tcp: true, onEvent: onEvent)
      let plain = "\(NBDURI(server.server.endpoint, export: ""))"
      try expect(["nbdinfo", plain], status: 1, says: "TLS")
      try expect(["qemu-io", "-r", "-c", "read 0 1M"] + qemu(server, other.path), status: 1)
      let socket = try server.server.endpoint.connect()
      let talk = Wire.flags(3) + Wire.option(.startTLS) + Array("and then something else, which is no TLS".utf8)
      #expect(send(socket.rawValue, talk, talk.count, Int32(MSG_NOSIGNAL)) == talk.count)
      var rest = [UInt8](repeating: 0, count: 4096)
      while recv(socket.rawValue, &rest, rest.count, 0) > 0 {}
      try expect(["nbdinfo", server.uri])
      try server.stop()
    }
    #expect(!found.isEmpty, "\(found)")
  }
}
