/// Where a port's frames go.
protocol SwitchLink: AnyObject {
  /// Sends a frame with its length before it; the bytes stay where they are until `flush`.
  func send(_ frame: UnsafeRawBufferPointer)
  func flush()
  func close()
}

extension StreamLink: SwitchLink {}

/// One of a switch's ports.
final class SwitchPort {
  /// Its place among the ports, which a later one may have when it is gone.
  let index: Int
  let name: String
  let traffic = Traffic()
  /// nil while nobody is at the other end.
  var link: (any SwitchLink)?
  /// Of an uplink to another switch.
  var connector: StreamConnector?
  /// It has been sent something that is not flushed.
  var isTouched = false

  init(index: Int, name: String) {
    self.index = index
    self.name = name
  }

  func close() {
    connector?.close()
    link?.close()
    connector = nil
    link = nil
  }
}
