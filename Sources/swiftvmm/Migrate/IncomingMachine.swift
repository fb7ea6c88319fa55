import Glibc
import Host
import Machine
import Migration
import Monitor

/// `run --incoming`: waits for a machine, which then runs here.
final class IncomingMachine: Sendable {
  private let destination: MigrationDestination

  /// Listens.
  init(_ machine: MovingMachine, at text: String, _ control: MigrationControl) throws(Failure) {
    do throws(HostError) {
      destination = MigrationDestination(machine, on: try StreamListener(StreamEndpoint(text))) {
        control.tell($0)
      }
    } catch {
      throw .host(error)
    }
    control.follow(destination)
  }

  /// Takes the machine on a thread of its own; `failed` is called where it does not come.
  func start(failed: @escaping @Sendable (MigrationError) -> Void) throws(Failure) {
    do throws(HostError) {
      _ = try HostThread(name: "incoming") { [self] in
        do throws(MigrationError) {
          try destination.run()
        } catch {
          failed(error)
        }
      }
    } catch {
      throw .host(error)
    }
  }
}
