import ArgumentParser
import NetLayer

/// The value of `--net`: `tap=NAME|switch=SOCKET|none[,mac=][,mtu=][,id=][,offloads=]`; a comma in a name is doubled.
struct NetworkOption: ExpressibleByArgument {
  /// The words that it was made of.
  let text: String
  init?(argument: String) { text = argument }

  /// The least that every host of IPv4 takes, to the longest that the device can name (virtio 1.2, 5.1.4.1).
  private static let mtus = 68...65535

  /// No card.
  var isNone: Bool { text == "none" }

  /// What the words say; `number` names a card that has no id.
  func parse(number: Int) throws(Failure) -> Network {
    var parts = DiskOption.split(text)
    let attachment: NetworkAttachment
    do throws(NetworkError) { attachment = try NetworkAttachment(parts.removeFirst()) } catch { throw .network(error) }
    var network = Network(attachment: attachment, name: "net\(number)")
    for part in parts {
      guard let equals = part.firstIndex(of: "=") else {
        throw .badValue(option: "--net", value: part, expected: "KEY=VALUE, such as mtu=9000")
      }
      let (key, value) = (String(part[..<equals]), String(part[part.index(after: equals)...]))
      switch key {
      case "id":
        guard DiskOption.isName(value) else {
          throw .badValue(option: "--net id", value: value, expected: "a letter, then letters, digits, - . _")
        }
        network.name = value
      case "mac":
        guard let address = MACAddress(value), !address.isMulticast, address.rawValue != 0 else {
          throw .badValue(option: "--net mac", value: value, expected: "a station's address, such as 52:54:00:12:34:56")
        }
        network.address = address
      case "mtu":
        guard let mtu = Int(value), Self.mtus.contains(mtu) else {
          throw .badValue(
            option: "--net mtu", value: value, expected: "\(Self.mtus.lowerBound) to \(Self.mtus.upperBound)")
        }
        network.mtu = UInt16(mtu)
      case "offloads":
        guard let choice = Switch(rawValue: value) else {
          throw .badValue(option: "--net offloads", value: value, expected: "on, off")
        }
        network.usesOffloads = choice == .on
      default:
        throw .badValue(option: "--net", value: part, expected: "mac=, mtu=, id= or offloads=")
      }
    }
    return network
  }
}

/// A network card as the command line describes it.
struct Network {
  var attachment: NetworkAttachment
  var name: String
  var address: MACAddress?
  var mtu: UInt16?
  var usesOffloads = true

  init(attachment: NetworkAttachment, name: String) {
    self.attachment = attachment
    self.name = name
  }
}
