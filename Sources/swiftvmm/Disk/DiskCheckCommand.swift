import ArgumentParser
import BlockLayer
import JSON

/// `swiftvmm disk check`: whether an image's tables agree with each other, and repairs.
struct DiskCheckCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "check",
    abstract: "Look for damage and leaks in a qcow2 image, and repair them.",
    discussion: """
      Example: swiftvmm disk check -r leaks disk.qcow2
      Ends with 0 where nothing is wrong, 2 for corruptions, 3 for leaks only, 63 where the format has nothing to check.
      """)

  enum Repair: String, ExpressibleByArgument, CaseIterable {
    case leaks, all
  }

  @Option(name: [.customShort("r"), .long], help: "leaks, or all.")
  var repair: Repair?

  @Flag(name: .customShort("q"), help: "Print nothing but errors.")
  var quiet = false

  @OptionGroup var output: DiskOutput
  @OptionGroup var image: DiskImage

  func run() throws {
    let queue = try makeIOQueue()
    var options = Qcow2Image.Options()
    options.forCheck = true
    let chain = try image.open(writable: repair != nil, backing: false, options: options, queue: queue)
    let report = try withChain(chain) { () throws -> Qcow2CheckReport? in
      guard let disk = chain.layers[0].qcow2 else { return nil }
      guard let repair else { return try disk.check() }
      return try disk.repair(repair == .leaks ? .leaks : [.leaks, .errors])
    }
    guard let report else {
      printError("swiftvmm: \(image.file) is raw, which has nothing to check")
      throw ExitCode(63)
    }
    if !quiet { print(output.isJSON ? json(report) : text(report)) }
    if report.checkErrors > 0 { throw ExitCode(1) }
    if report.corruptions > 0 { throw ExitCode(2) }
    if report.leaks > 0 { throw ExitCode(3) }
  }

  private func json(_ report: Qcow2CheckReport) -> String {
    var object: JSONObject = [
      "filename": .string(image.file), "format": "qcow2", "check-errors": JSONValue(report.checkErrors),
    ]
    func add(_ key: String, _ value: some BinaryInteger) { if value != 0 { object[key] = JSONValue(value) } }
    add("image-end-offset", report.imageEnd)
    add("total-clusters", report.totalClusters)
    add("allocated-clusters", report.allocatedClusters)
    add("fragmented-clusters", report.fragmentedClusters)
    add("compressed-clusters", report.compressedClusters)
    add("corruptions", report.corruptions)
    add("leaks", report.leaks)
    add("corruptions-fixed", report.corruptionsFixed)
    add("leaks-fixed", report.leaksFixed)
    return JSONValue.object(object).serialized(pretty: true)
  }

  private func text(_ report: Qcow2CheckReport) -> String {
    var lines = report.isClean ? [] : report.findings
    if report.corruptionsFixed > 0 || report.leaksFixed > 0 {
      lines.append("Repaired: \(report.corruptionsFixed) corruptions, \(report.leaksFixed) leaked clusters.")
    }
    if report.isClean {
      lines.append("No errors were found on the image.")
    } else {
      if report.corruptions > 0 {
        lines.append("\(report.corruptions) errors were found on the image; data may be lost, or lost by later writes.")
      }
      if report.leaks > 0 {
        lines.append("\(report.leaks) leaked clusters were found on the image; space is wasted, no data is lost.")
      }
    }
    if report.totalClusters > 0, report.allocatedClusters > 0 {
      func percent(_ part: UInt64, _ whole: UInt64) -> String { decimal(Double(part) * 100 / Double(whole), 2) + "%" }
      lines.append(
        "\(report.allocatedClusters)/\(report.totalClusters) = \(percent(report.allocatedClusters, report.totalClusters))"
          + " allocated, \(percent(report.fragmentedClusters, report.allocatedClusters)) fragmented, "
          + "\(percent(report.compressedClusters, report.allocatedClusters)) compressed clusters")
    }
    if report.imageEnd > 0 { lines.append("Image end offset: \(report.imageEnd)") }
    return lines.joined(separator: "\n")
  }
}
