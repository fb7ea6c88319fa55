import LoaderHardening
import Testing

/// Ed25519 by the vectors of RFC 8032, 7.1, and by what a verifier must refuse.
@Suite struct Ed25519Tests {
  struct Vector: Sendable {
    var secret: String
    var key: String
    var message: String
    var signature: String
  }

  static let vectors = [
    Vector(
      secret: "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
      key: "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", message: "",
      signature: "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        + "d25bf5f0595bbe24655141438e7a100b"),
    Vector(
      secret: "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
      key: "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", message: "72",
      signature: "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        + "387b2eaeb4302aeeb00d291612bb0c00"),
    Vector(
      secret: "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
      key: "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025", message: "af82",
      signature: "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        + "4a7c15e9716ed28dc027beceea1ec40a"),
  ]

  @Test(arguments: vectors)
  func agreesWithTheRFC(_ vector: Vector) throws {
    let secret = try #require(Hexadecimal.bytes(vector.secret))
    let message = try #require(Hexadecimal.bytes(vector.message))
    #expect(Hexadecimal.text(Ed25519.publicKey(secret)) == vector.key)
    let signature = Ed25519.sign(message, secret: secret)
    #expect(Hexadecimal.text(signature) == vector.signature)
    #expect(Ed25519.verify(signature, message, key: Ed25519.publicKey(secret)))
  }

  @Test func refusesWhatIsNotTheSignature() throws {
    let secret = [UInt8](repeating: 7, count: 32)
    let key = Ed25519.publicKey(secret)
    // Past one block of SHA-512, and past two.
    for count in [0, 1, 111, 112, 127, 128, 129, 300] {
      let message = (0..<count).map { UInt8(truncatingIfNeeded: $0 &* 31) }
      let signature = Ed25519.sign(message, secret: secret)
      #expect(Ed25519.verify(signature, message, key: key))
      #expect(!Ed25519.verify(signature, message + [0], key: key))
      for position in [0, 31, 32, 63] {
        var wrong = signature
        wrong[position] ^= 1
        #expect(!Ed25519.verify(wrong, message, key: key))
      }
    }
    let signature = Ed25519.sign([1, 2, 3], secret: secret)
    #expect(!Ed25519.verify(Array(signature.dropLast()), [1, 2, 3], key: key))
    #expect(!Ed25519.verify(signature, [1, 2, 3], key: Ed25519.publicKey([UInt8](repeating: 8, count: 32))))
    // A response that is the order too large means the same, and is refused (RFC 8032, 5.1.7).
    let order = try #require(
      Hexadecimal.bytes("edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010"))
    var carry = 0
    var larger = signature
    for index in 0..<32 {
      carry += Int(signature[32 + index]) + Int(order[index])
      larger[32 + index] = UInt8(carry & 0xff)
      carry >>= 8
    }
    #expect(!Ed25519.verify(larger, [1, 2, 3], key: key))
    // No point has this y; and one that is not below the prime.
    #expect(!Ed25519.verify(signature, [1, 2, 3], key: [2] + [UInt8](repeating: 0, count: 31)))
    #expect(!Ed25519.verify(signature, [1, 2, 3], key: [UInt8](repeating: 0xff, count: 32)))
  }

  @Test func modulesCarryTheirSignatures() {
    let secrets: [[UInt8]] = [[UInt8](repeating: 1, count: 32), [UInt8](repeating: 2, count: 32)]
    let keys = secrets.map(Ed25519.publicKey)
    let module = (0..<1000).map { UInt8(truncatingIfNeeded: $0) }
    let signed = Hypercall.signed(module, secret: secrets[1])
    #expect(signed.count == 1072)
    #expect(Hypercall.signer(of: signed, keys: keys) == 1)
    #expect(Hypercall.signer(of: signed, keys: [keys[0]]) == nil)
    #expect(Hypercall.signer(of: module, keys: keys) == nil)
    var tampered = signed
    tampered[500] ^= 0x80
    #expect(Hypercall.signer(of: tampered, keys: keys) == nil)
    #expect(Hypercall.signer(of: Array(signed.suffix(72)), keys: keys) == nil)
  }
}
