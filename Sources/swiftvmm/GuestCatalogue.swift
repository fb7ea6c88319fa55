import Glibc

/// The bundled sample guests, as `scripts/build-guests` leaves them: an index of `name TAB file TAB description`.
struct GuestCatalogue {
  struct Guest {
    let name: String
    let path: String
    let description: String
  }

  let guests: [Guest]

  /// Reads the index from `$SWIFTVMM_GUESTS`, from the installation, or from the checkout the program was built in.
  static func load() throws(Failure) -> GuestCatalogue {
    let folders = searchPath()
    for folder in folders {
      guard let text = readText("\(folder)/index.txt") else { continue }
      let guests = text.split(separator: "\n").compactMap { line -> Guest? in
        let fields = line.split(separator: "\t", maxSplits: 2)
        guard fields.count == 3 else { return nil }
        return Guest(name: String(fields[0]), path: "\(folder)/\(fields[1])", description: String(fields[2]))
      }
      return GuestCatalogue(guests: guests)
    }
    throw .guestsNotBuilt(searched: folders)
  }

  /// The file of a guest: a path as it is, otherwise a bundled guest's.
  static func path(of guest: String) throws(Failure) -> String {
    if guest.contains("/") || access(guest, F_OK) == 0 { return guest }
    let catalogue = try load()
    guard let found = catalogue.guests.first(where: { $0.name == guest }) else {
      throw .unknownGuest(guest, known: catalogue.guests.map(\.name))
    }
    return found.path
  }

  /// Debian's kernel and an initramfs, as `scripts/fetch-linux` leaves them beside the guests.
  static func linux() throws(Failure) -> (kernel: String, initramfs: String) {
    let folders = searchPath().map { "\($0)/../linux" }
    for folder in folders {
      let files = (kernel: "\(folder)/vmlinuz", initramfs: "\(folder)/initramfs.gz")
      if access(files.kernel, R_OK) == 0, access(files.initramfs, R_OK) == 0 { return files }
    }
    throw .linuxNotFetched(searched: folders)
  }

  private static func searchPath() -> [String] {
    var folders: [String] = []
    if let value = getenv("SWIFTVMM_GUESTS") { folders.append(String(cString: value)) }
    guard var folder = executableFolder() else { return folders }
    folders.append("\(folder)/../share/swiftvmm/guests")
    // From .build/<triple>/<configuration>/ up to the checkout.
    for _ in 0..<4 {
      folders.append("\(folder)/build/guests")
      guard let slash = folder.lastIndex(of: "/"), slash != folder.startIndex else { break }
      folder = String(folder[..<slash])
    }
    return folders
  }

  private static func executableFolder() -> String? {
    var buffer = [CChar](repeating: 0, count: Int(PATH_MAX))
    let count = readlink("/proc/self/exe", &buffer, buffer.count - 1)
    guard count > 0 else { return nil }
    let path = String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
    return path.lastIndex(of: "/").map { String(path[..<$0]) }
  }
}

/// A small text file, whole; nil where it cannot be read.
func readText(_ path: String) -> String? {
  guard let file = fopen(path, "re") else { return nil }
  defer { fclose(file) }
  var bytes: [UInt8] = []
  var chunk = [UInt8](repeating: 0, count: 4096)
  while true {
    let count = fread(&chunk, 1, chunk.count, file)
    guard count > 0, bytes.count < 1 << 20 else { break }
    bytes += chunk[..<count]
  }
  return String(decoding: bytes, as: UTF8.self)
}
