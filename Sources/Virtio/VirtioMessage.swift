/// The texts that this target prints.
enum VirtioMessage {
  case queueBroken(device: String, queue: Int, VirtqueueError)

  /// One line.
  var text: String {
    switch self {
    case .queueBroken(let device, let queue, let error):
      "\(device): queue \(queue): \(error); the device stops until the guest's driver resets it"
    }
  }
}
