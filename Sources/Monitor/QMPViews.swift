import JSON

/// The views of a hardened machine's memory.
public struct MonitorViews: Equatable, Sendable {
  /// A view.
  public struct View: Equatable, Sendable {
    /// kernel or loader.
    public var name: String
    /// What violations call it.
    public var number: UInt32
    /// The rights of what is in no range, as `rwx`.
    public var rights: String
    /// Start, bytes and rights of ranges that have other rights.
    public var ranges: [(start: UInt64, size: UInt64, rights: String)]

    /// A view and its ranges.
    public init(name: String, number: UInt32, rights: String, ranges: [(start: UInt64, size: UInt64, rights: String)]) {
      (self.name, self.number, self.rights, self.ranges) = (name, number, rights, ranges)
    }

    /// Equal where all members are.
    public static func == (left: View, right: View) -> Bool {
      left.name == right.name && left.number == right.number && left.rights == right.rights
        && left.ranges.elementsEqual(right.ranges) { $0 == $1 }
    }
  }

  /// A vCPU: its active view, how often it went to the loader's, how many of its accesses were denied.
  public struct VCPU: Equatable, Sendable {
    /// Its number.
    public var index: Int
    /// The name of its view.
    public var view: String
    /// Visits of the loader.
    public var switches: UInt64
    /// Violations.
    public var denials: UInt64

    /// A vCPU and its counts.
    public init(index: Int, view: String, switches: UInt64, denials: UInt64) {
      (self.index, self.view, self.switches, self.denials) = (index, view, switches, denials)
    }
  }

  /// Whether the registration is locked.
  public var isLocked: Bool
  /// The views.
  public var views: [View]
  /// The vCPUs.
  public var vcpus: [VCPU]

  /// All of it.
  public init(isLocked: Bool, views: [View], vcpus: [VCPU]) {
    (self.isLocked, self.views, self.vcpus) = (isLocked, views, vcpus)
  }
}

extension MonitorTarget {
  /// nil: the machine is not hardened.
  public var views: MonitorViews? { nil }
  /// Refused: the machine is not hardened.
  public func protect(_ name: String, start: UInt64, size: UInt64, rights: String) throws(MonitorError) {
    throw .refused("the machine runs without --harden")
  }
}

extension QMPCommand {
  /// Commands about views.
  static let views: [QMPCommand] = [
    QMPCommand("x-swiftvmm-query-views", returns: Types.views) { context, _ throws(MonitorError) in
      guard let views = context.target.views else { throw .refused("the machine runs without --harden") }
      let list = views.views.map { view -> JSONValue in
        let ranges = view.ranges.map { range -> JSONValue in
          ["start": JSONValue(range.start), "size": JSONValue(range.size), "rights": .string(range.rights)]
        }
        return [
          "name": .string(view.name), "number": JSONValue(view.number), "rights": .string(view.rights),
          "ranges": .array(ranges),
        ]
      }
      let vcpus = views.vcpus.map { vcpu -> JSONValue in
        [
          "cpu-index": JSONValue(vcpu.index), "view": .string(vcpu.view), "switches": JSONValue(vcpu.switches),
          "denials": JSONValue(vcpu.denials),
        ]
      }
      return ["locked": .bool(views.isLocked), "views": .array(list), "vcpus": .array(vcpus)]
    },
    QMPCommand(
      "x-swiftvmm-protect",
      [
        .required("name", .string), .required("start", .integer), .required("size", .integer),
        .required("rights", .string),
      ]
    ) { context, arguments throws(MonitorError) in
      guard let start = arguments["start"]?.unsignedValue else { throw .parameterValue("start", value: "below 0") }
      guard let size = arguments["size"]?.unsignedValue else { throw .parameterValue("size", value: "below 0") }
      try context.target.protect(
        arguments["name"]?.stringValue ?? "", start: start, size: size, rights: arguments["rights"]?.stringValue ?? "")
      return [:]
    },
  ]

  private enum Types {
    static let range = QMPType.object(
      "SwiftvmmViewRange",
      members: [.required("start", .integer), .required("size", .integer), .required("rights", .string)])
    static let view = QMPType.object(
      "SwiftvmmView",
      members: [
        .required("name", .string), .required("number", .integer), .required("rights", .string),
        .required("ranges", .array(range)),
      ])
    static let vcpu = QMPType.object(
      "SwiftvmmViewCPU",
      members: [
        .required("cpu-index", .integer), .required("view", .string), .required("switches", .integer),
        .required("denials", .integer),
      ])
    static let views = QMPType.object(
      "SwiftvmmViews",
      members: [.required("locked", .bool), .required("views", .array(view)), .required("vcpus", .array(vcpu))])
  }
}
