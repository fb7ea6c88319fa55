import Host
import Machine
import NetLayer
import Virtio

/// The network cards of a run, and the thread that they belong to.
final class RunNetworks: @unchecked Sendable {
  private let loop: EventLoop
  private let thread: HostThread
  private let cards: [(network: Network, card: MachineNetworkCard)]

  /// Attaches nothing yet. Nil where there are no cards.
  init?(_ options: [NetworkOption], _ station: () throws(Failure) -> StationAddress) throws(Failure) {
    if options.contains(where: \.isNone) {
      guard options.count == 1 else { throw .conflict("--net none", "another --net") }
      return nil
    }
    guard !options.isEmpty else { return nil }
    let addresses = try station()
    var cards: [(Network, MachineNetworkCard)] = []
    for (number, option) in options.enumerated() {
      let network = try option.parse(number: number)
      let backend: any NetworkBackend
      do throws(NetworkError) { backend = try network.attachment.makeBackend() } catch { throw .network(error) }
      var card = MachineNetworkCard(
        name: network.name, address: network.address ?? addresses.address(of: network, number: number), backend: backend
      )
      card.mtu = network.mtu
      card.usesOffloads = network.usesOffloads
      cards.append((network, card))
    }
    self.cards = cards
    do throws(HostError) {
      let loop = try EventLoop()
      self.loop = loop
      thread = try HostThread(name: "network") { loop.run() }
    } catch {
      throw .host(error)
    }
  }

  /// What the machine is told of them.
  var configuration: MachineNetworks { MachineNetworks(loop: loop, cards: cards.map(\.card)) }

  /// Cards whose address the command line has: a machine that comes must have the same.
  var addressed: Set<String> { Set(cards.filter { $0.network.address != nil }.map(\.network.name)) }

  func backend(of name: String) -> (any NetworkBackend)? { cards.first { $0.card.name == name }?.card.backend }

  /// Runs `body` on the cards' thread and waits for it.
  func perform<Result>(_ body: @escaping () -> Result) -> Result {
    let outcome = Condition<Transfer<Result>?>(nil)
    let work = Transfer(value: body)
    loop.execute {
      let result = Transfer(value: work.value())
      outcome.withLock { $0 = result }
    }
    return outcome.wait { $0 }.value
  }

  /// Something handed from one thread to another, which waits for it.
  private struct Transfer<Value>: @unchecked Sendable {
    let value: Value
  }

  /// Lets go of the networks. The machine is over.
  func close() {
    perform { [self] in for (_, card) in cards { card.backend.close() } }
    loop.stop()
    thread.join()
  }
}
