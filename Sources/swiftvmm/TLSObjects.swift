import ArgumentParser
import BlockLayer
import JSON
import Monitor
import Synchronization
import TLS

/// The value of `--tls-creds`: `DIR[,verify-peer=on|off]`; a comma in a name is doubled.
struct TLSOption: ExpressibleByArgument {
  let directory: String
  let verifiesPeer: Bool

  init?(argument: String) {
    let parts = DiskOption.split(argument)
    guard !parts[0].isEmpty, parts.count <= 2 else { return nil }
    directory = parts[0]
    switch parts.dropFirst().first {
    case nil, "verify-peer=on": verifiesPeer = true
    case "verify-peer=off": verifiesPeer = false
    default: return nil
    }
  }

  /// Reads the folder.
  func credentials(_ endpoint: TLSCredentials.Endpoint) throws(Failure) -> TLSCredentials {
    do {
      return try TLSCredentials(directory: directory, endpoint: endpoint, verifiesPeer: verifiesPeer)
    } catch {
      throw .tls(error)
    }
  }

  /// `object-add`'s arguments; a machine's process has another working directory.
  func object(_ id: String, _ endpoint: TLSCredentials.Endpoint) -> JSONObject {
    [
      "qom-type": .string(TLSObjects.type), "id": .string(id), "dir": .string(BlockGraph.absolute(directory)),
      "endpoint": .string(endpoint.rawValue), "verify-peer": .bool(verifiesPeer),
    ]
  }
}

/// The credentials that a machine's control socket was given, by their ids.
final class TLSObjects: Sendable {
  /// QEMU's name of what an object is.
  static let type = "tls-creds-x509"

  private let objects = Mutex<[String: TLSCredentials]>([:])

  /// Credentials for one end of a session. Where QEMU has an error for the case, the text is QEMU's.
  func credentials(_ id: String, _ endpoint: TLSCredentials.Endpoint) throws(MonitorError) -> TLSCredentials {
    guard let found = objects.withLock({ $0[id] }) else { throw .refused("No TLS credentials with id '\(id)'") }
    guard found.endpoint == endpoint else {
      throw .refused("Expected TLS credentials for a \(endpoint.rawValue) endpoint")
    }
    return found
  }

  /// QMP's commands on them.
  var commands: [QMPCommand] {
    [
      QMPCommand(
        "object-add",
        [
          .required("qom-type", .enumeration("ObjectType", values: [Self.type])), .required("id", .string),
          .required("dir", .string),
          .optional("endpoint", .enumeration("QCryptoTLSCredsEndpoint", values: ["client", "server"])),
          .optional("verify-peer", .bool),
        ]
      ) { [self] _, arguments throws(MonitorError) in
        let id = arguments.text("id")
        do throws(TLSError) {
          let credentials = try TLSCredentials(
            directory: arguments.text("dir"),
            endpoint: TLSCredentials.Endpoint(rawValue: arguments.text("endpoint")) ?? .client,
            verifiesPeer: arguments["verify-peer"]?.boolValue ?? true)
          let isNew = objects.withLock { objects in
            guard objects[id] == nil else { return false }
            objects[id] = credentials
            return true
          }
          if isNew { return [:] }
        } catch {
          throw .refused("\(error)")
        }
        throw .refused("there is an object '\(id)' already; choose another id or use object-del")
      },
      QMPCommand("object-del", [.required("id", .string)]) { [self] _, arguments throws(MonitorError) in
        let id = arguments.text("id")
        // Who has them keeps them.
        guard objects.withLock({ $0.removeValue(forKey: id) }) != nil else {
          throw .refused("object '\(id)' not found")
        }
        return [:]
      },
    ]
  }
}
