/// Measurements of one thing; the median is what reports quote, because a shared machine is noisy.
struct Samples {
  private(set) var values: [Double]

  init(_ values: [Double]) {
    self.values = values.sorted()
  }

  var median: Double {
    guard !values.isEmpty else { return .nan }
    let middle = values.count / 2
    return values.count % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2
  }
  var minimum: Double { values.first ?? .nan }
  var maximum: Double { values.last ?? .nan }
}
