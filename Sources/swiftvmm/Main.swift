import ArgumentParser

@main
struct SwiftVMM: ParsableCommand {
  func run() {}
}
