import COpenSSL
import Glibc

/// What is common to all uses of the library.
enum OpenSSL {
  /// Once, and only where TLS is used: it costs a program that does not use it nothing. The host's configuration is none
  /// of ours (it may name modules to load), and nothing is torn down while threads may still use it.
  private static let once: Bool =
    OPENSSL_init_ssl(UInt64(OPENSSL_INIT_NO_LOAD_CONFIG) | UInt64(OPENSSL_INIT_NO_ATEXIT), nil) == 1

  static func initialize() { _ = once }

  /// What the library says of its last failure.
  static func failure() -> TLSError { .library(reason: reason(ERR_peek_last_error())) }

  static func reason(_ code: UInt) -> String {
    ERR_reason_error_string(code).map { String(cString: $0) } ?? "error \(code)"
  }

  /// A result of a certificate's verification.
  static func certificateFault(_ code: Int, host: String) -> TLSError.CertificateFault {
    switch Int32(truncatingIfNeeded: code) {
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT, X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY,
      X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT, X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN,
      X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE, X509_V_ERR_CERT_SIGNATURE_FAILURE:
      .unknownCA
    case X509_V_ERR_CERT_HAS_EXPIRED: .expired
    case X509_V_ERR_CERT_NOT_YET_VALID: .notYetValid
    case X509_V_ERR_CERT_REVOKED: .revoked
    case X509_V_ERR_INVALID_PURPOSE: .purpose
    case X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH: .hostName(wanted: host)
    case X509_V_ERR_EE_KEY_TOO_SMALL, X509_V_ERR_CA_KEY_TOO_SMALL, X509_V_ERR_CA_MD_TOO_WEAK: .weak
    default: .other(String(cString: X509_verify_cert_error_string(code)))
    }
  }

  /// An alert of the other side's.
  static func alert(_ number: Int32) -> String {
    // The library's table ends before TLS 1.3.
    if number == SSL_AD_CERTIFICATE_REQUIRED { return "certificate required" }
    return String(cString: SSL_alert_desc_string_long(number))
  }
}
