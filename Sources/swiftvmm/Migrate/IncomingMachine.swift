import Glibc
import Host
import Machine
import Migration
import Monitor
import TLS

/// `run --incoming`: waits for a machine, which then runs here.
final class IncomingMachine: Sendable {
  private let destination: MigrationDestination

  /// Listens; with `credentials` for sources with TLS alone.
  init(
    _ machine: MovingMachine, at text: String, _ credentials: TLSCredentials?, _ control: MigrationControl
  ) throws(Failure) {
    do throws(HostError) {
      destination = MigrationDestination(
        machine, on: try StreamListener(StreamEndpoint(text)), credentials: credentials,
        onRefusal: { printError("swiftvmm: a source was turned away: \($0)") }, onStatus: { control.tell($0) })
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
