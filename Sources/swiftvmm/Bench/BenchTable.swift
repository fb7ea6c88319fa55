import JSON

/// Rows of a benchmark: a name, then median, minimum and maximum of one or more figures.
struct BenchTable {
  struct Column {
    let name: String
    let unit: String
    let digits: Int
  }

  let columns: [Column]
  private(set) var rows: [(name: String, figures: [Samples?], note: String)] = []
  var notes: [String] = []

  init(_ columns: [Column]) {
    self.columns = columns
  }

  mutating func add(_ name: String, _ figures: [Samples?], note: String = "") {
    rows.append((name, figures, note))
  }

  func text(title: String) -> String {
    let header = [""] + columns.map { $0.unit.isEmpty ? $0.name : "\($0.name) \($0.unit)" }
    let cells = rows.map { row in
      [row.name] + zip(columns, row.figures).map { column, samples in samples.map { cell($0, column.digits) } ?? "-" }
    }
    let widths = header.indices.map { column in ([header] + cells).map { $0[column].count }.max()! + 2 }
    func line(_ cells: [String]) -> String { zip(cells, widths).map(pad).joined() }
    let lines = ["\(title); median [min-max]", line(header)] + zip(rows, cells).map { line($1) + $0.note }
    return (lines + notes.map { "  \($0)" }).joined(separator: "\n") + "\n"
  }

  var json: JSONValue {
    .object([
      "rows": .array(
        rows.map { row in
          var object: JSONObject = ["name": .string(row.name)]
          for (column, samples) in zip(columns, row.figures) {
            guard let samples else { continue }
            object[column.unit.isEmpty ? column.name : "\(column.name)-\(column.unit)"] = [
              "median": .number(samples.median), "minimum": .number(samples.minimum),
              "maximum": .number(samples.maximum), "runs": JSONValue(samples.values.count),
            ]
          }
          if !row.note.isEmpty { object["note"] = .string(row.note) }
          return .object(object)
        }),
      "notes": .array(notes.map { .string($0) }),
    ])
  }

  private func cell(_ samples: Samples, _ digits: Int) -> String {
    "\(decimal(samples.median, digits)) [\(decimal(samples.minimum, digits))-\(decimal(samples.maximum, digits))]"
  }

  private func pad(_ text: String, _ width: Int) -> String {
    text + String(repeating: " ", count: max(1, width - text.count))
  }
}

/// A number with a fixed count of decimals.
func decimal(_ value: Double, _ digits: Int) -> String {
  guard value.isFinite else { return "-" }
  var scale = 1.0
  for _ in 0..<digits { scale *= 10 }
  let scaled = (value * scale).rounded()
  guard digits > 0, abs(scaled) < 1e15 else { return String(Int64(clampingDouble: scaled)) }
  let whole = Int64(scaled) / Int64(scale)
  let fraction = String(abs(Int64(scaled) % Int64(scale)))
  return "\(scaled < 0 && whole == 0 ? "-" : "")\(whole)."
    + String(repeating: "0", count: digits - fraction.count) + fraction
}

extension Int64 {
  fileprivate init(clampingDouble value: Double) {
    self = value >= 9.2e18 ? .max : value <= -9.2e18 ? .min : Int64(value)
  }
}
