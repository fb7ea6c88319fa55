import ArgumentParser
import JSON
import Monitor

/// `swiftvmm status`: what a running machine does.
struct StatusCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "status",
    abstract: "Tell what a running machine does.",
    discussion: "Example: swiftvmm status /tmp/vm.sock")

  @OptionGroup var control: ControlSocket

  @Flag(help: "Print JSON.")
  var json = false

  func run() throws {
    let (status, cpus, exits) = try control.withClient { client in
      (
        try client.execute("query-status"), try client.execute("query-cpus-fast"),
        try client.execute("x-swiftvmm-query-exits")
      )
    }
    if json {
      print((["status": status["status"] ?? nil, "cpus": cpus, "exits": exits] as JSONValue).serialized(pretty: true))
      return
    }
    let counts = (exits.arrayValue ?? []).compactMap { $0["count"]?.unsignedValue }
    let total = counts.reduce(0) { $0 &+ $1 }
    print("\(status["status"]?.stringValue ?? "unknown"), vCPUs: \(cpus.arrayValue?.count ?? 0), exits: \(total)")
  }
}

/// `swiftvmm pause`.
struct PauseCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "pause",
    abstract: "Pause a running machine; its memory and devices stay as they are.",
    discussion: "Example: swiftvmm pause /tmp/vm.sock")

  @OptionGroup var control: ControlSocket

  func run() throws {
    _ = try control.withClient { client in try client.execute("stop") }
  }
}

/// `swiftvmm resume`.
struct ResumeCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "resume",
    abstract: "Let a paused machine go on, or start one that waits for it.",
    discussion: "Example: swiftvmm resume /tmp/vm.sock")

  @OptionGroup var control: ControlSocket

  func run() throws {
    _ = try control.withClient { client in try client.execute("cont") }
  }
}

/// `swiftvmm stop`.
struct StopCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "stop",
    abstract: "End a running machine: press its power button, wait for the guest, then end it in any case.",
    discussion: """
      Example: swiftvmm stop /tmp/vm.sock
      At once, without asking the guest: swiftvmm stop --now /tmp/vm.sock
      """)

  @OptionGroup var control: ControlSocket

  @Flag(help: "Do not ask the guest first.")
  var now = false

  @Option(help: "Seconds the guest has to power off by itself.")
  var grace = 10

  func validate() throws {
    guard (0...86400).contains(grace) else { throw ValidationError("--grace is 0 to 86400 seconds, not \(grace)") }
  }

  func run() throws {
    try control.withClient { client in
      // A guest that is paused, or has no power button, is no reason to go on living.
      if !now, (try? client.execute("system_powerdown")) != nil, try client.waitForEnd(seconds: grace) { return }
      try client.quit()
    }
  }
}
