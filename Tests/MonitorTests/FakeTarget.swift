import Glibc
import JSON
import Monitor
import Synchronization

/// A machine without a guest, which writes down what it is asked.
final class FakeTarget: MonitorTarget {
  struct State {
    var runState = RunState.prelaunch
    var calls: [String] = []
  }

  let state = Mutex(State())
  let onEvent = Mutex<(@Sendable (QMPEvent) -> Void)?>(nil)

  var runState: RunState { state.withLock { $0.runState } }
  var calls: [String] { state.withLock { $0.calls } }
  let virtualCPUs = [MonitorVCPU(index: 0, threadID: 100), MonitorVCPU(index: 1, threadID: 101)]
  let exitCounts = [ExitCount(reason: "port-io", count: 7), ExitCount(reason: "halt", count: UInt64.max)]
  let usesKVM = true

  func pause() throws(MonitorError) {
    guard runState == .running else { return }
    change("pause", to: .paused)
    onEvent.withLock { $0 }?(.stop)
  }

  func resume() throws(MonitorError) {
    change("resume", to: .running)
    onEvent.withLock { $0 }?(.resume)
  }

  func powerDown() throws(MonitorError) {
    guard runState == .running else { throw .refused("the guest is not running") }
    change("powerDown", to: .running)
    onEvent.withLock { $0 }?(.powerDown)
  }

  func reset() throws(MonitorError) { change("reset", to: runState) }

  func quit() { change("quit", to: .shutdown) }

  private func change(_ call: String, to runState: RunState) {
    state.withLock { state in
      state.calls.append(call)
      state.runState = runState
    }
  }
}

func temporaryPath() -> String {
  "/tmp/swiftvmm-test-\(getpid())-\(UInt64.random(in: 0...UInt64.max)).socket"
}
