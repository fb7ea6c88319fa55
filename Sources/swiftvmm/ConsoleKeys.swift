/// The keys that the console keeps for itself: Ctrl-A, then x ends the run, h shows help, Ctrl-A sends one Ctrl-A.
struct ConsoleKeys {
  enum Action: Equatable {
    case end, help
  }

  private static let prefix: UInt8 = 1
  private var armed = false

  static let help = """

    Ctrl-A x       end the run
    Ctrl-A h       show this help
    Ctrl-A Ctrl-A  send Ctrl-A to the guest

    """

  /// What the guest gets of the keys, and what the user asked of the program.
  mutating func filter(_ keys: some Sequence<UInt8>) -> (toGuest: [UInt8], actions: [Action]) {
    var toGuest: [UInt8] = []
    var actions: [Action] = []
    for key in keys {
      guard armed else {
        if key == Self.prefix { armed = true } else { toGuest.append(key) }
        continue
      }
      armed = false
      switch key {
      case UInt8(ascii: "x"): actions.append(.end)
      case UInt8(ascii: "h"): actions.append(.help)
      case Self.prefix: toGuest.append(Self.prefix)
      default: toGuest += [Self.prefix, key]
      }
    }
    return (toGuest, actions)
  }
}
