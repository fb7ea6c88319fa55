import CGuest

/// A check that fails ends the guest with `FAIL what expected got` and exit status 3.
func expect(_ what: StaticString, _ got: UInt64, equals expected: UInt64) {
  if got == expected { return }
  say("FAIL \(what) expected \(hex: expected) got \(hex: got)")
  Power.fail()
}

/// See `expect(_:_:equals:)`.
func expect(_ what: StaticString, _ holds: Bool) {
  if holds { return }
  say("FAIL \(what) expected true got false")
  Power.fail()
}

/// See `expect(_:_:equals:)`.
func expect(_ what: StaticString, _ got: UInt64, in range: ClosedRange<UInt64>) {
  if range.contains(got) { return }
  say("FAIL \(what) expected \(range.lowerBound)...\(range.upperBound) got \(got)")
  Power.fail()
}
