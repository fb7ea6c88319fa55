import ArgumentParser

struct GuestsCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "guests", abstract: "List the bundled sample guests.",
    discussion: "Example: swiftvmm guests")

  func run() throws {
    let guests = try GuestCatalogue.load().guests
    let width = guests.map(\.name.count).max() ?? 0
    for guest in guests {
      print(guest.name + String(repeating: " ", count: width + 2 - guest.name.count) + guest.description)
    }
  }
}
