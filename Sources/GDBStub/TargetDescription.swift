/// The target description that gdb reads (GDB manual, appendix G), made from the register layout.
struct TargetDescription {
  let xml: String

  init(_ layout: RegisterLayout) {
    var xml = """
      <?xml version="1.0"?>
      <!DOCTYPE target SYSTEM "gdb-target.dtd">
      <target version="1.0">
      <architecture>i386:x86-64</architecture>

      """
    var features: [String] = []
    for register in layout.registers where !features.contains(register.feature) { features.append(register.feature) }
    for feature in features {
      xml += "<feature name=\"\(feature)\">\n" + (Self.types[feature] ?? "")
      for (number, register) in layout.registers.enumerated() where register.feature == feature {
        let group = register.group.map { " group=\"\($0)\"" } ?? ""
        xml += "<reg name=\"\(register.name)\" bitsize=\"\(register.size * 8)\" type=\"\(register.type)\""
        xml += " regnum=\"\(number)\"\(group)/>\n"
      }
      xml += "</feature>\n"
    }
    self.xml = xml + "</target>\n"
  }

  /// The types that a feature's registers use and gdb does not have by itself.
  private static let types = [
    "org.gnu.gdb.i386.core": flags(
      "i386_eflags", bytes: 4,
      [
        ("CF", 0), ("", 1), ("PF", 2), ("AF", 4), ("ZF", 6), ("SF", 7), ("TF", 8), ("IF", 9), ("DF", 10), ("OF", 11),
        ("NT", 14), ("RF", 16), ("VM", 17), ("AC", 18), ("VIF", 19), ("VIP", 20), ("ID", 21),
      ]),
    "org.gnu.gdb.i386.sse": vectors
      + flags(
        "i386_mxcsr", bytes: 4,
        [
          ("IE", 0), ("DE", 1), ("ZE", 2), ("OE", 3), ("UE", 4), ("PE", 5), ("DAZ", 6), ("IM", 7), ("DM", 8),
          ("ZM", 9), ("OM", 10), ("UM", 11), ("PM", 12), ("FZ", 15),
        ]),
    "org.swiftvmm.system": flags(
      "cr0_flags", bytes: 8,
      [
        ("PE", 0), ("MP", 1), ("EM", 2), ("TS", 3), ("ET", 4), ("NE", 5), ("WP", 16), ("AM", 18), ("NW", 29),
        ("CD", 30), ("PG", 31),
      ])
      + flags(
        "cr4_flags", bytes: 8,
        [
          ("VME", 0), ("PVI", 1), ("TSD", 2), ("DE", 3), ("PSE", 4), ("PAE", 5), ("MCE", 6), ("PGE", 7), ("PCE", 8),
          ("OSFXSR", 9), ("OSXMMEXCPT", 10), ("UMIP", 11), ("LA57", 12), ("VMXE", 13), ("SMXE", 14), ("FSGSBASE", 16),
          ("PCIDE", 17), ("OSXSAVE", 18), ("SMEP", 20), ("SMAP", 21), ("PKE", 22), ("CET", 23), ("PKS", 24),
        ])
      + flags("efer_flags", bytes: 8, [("SCE", 0), ("LME", 8), ("LMA", 10), ("NXE", 11), ("SVME", 12)]),
  ]

  private static let vectors = """
    <vector id="v4f" type="ieee_single" count="4"/>
    <vector id="v2d" type="ieee_double" count="2"/>
    <vector id="v16i8" type="int8" count="16"/>
    <vector id="v8i16" type="int16" count="8"/>
    <vector id="v4i32" type="int32" count="4"/>
    <vector id="v2i64" type="int64" count="2"/>
    <union id="vec128">
    <field name="v4_float" type="v4f"/>
    <field name="v2_double" type="v2d"/>
    <field name="v16_int8" type="v16i8"/>
    <field name="v8_int16" type="v8i16"/>
    <field name="v4_int32" type="v4i32"/>
    <field name="v2_int64" type="v2i64"/>
    <field name="uint128" type="uint128"/>
    </union>

    """

  private static func flags(_ name: String, bytes: Int, _ bits: [(String, Int)]) -> String {
    let fields = bits.map { "<field name=\"\($0.0)\" start=\"\($0.1)\" end=\"\($0.1)\"/>\n" }.joined()
    return "<flags id=\"\(name)\" size=\"\(bytes)\">\n\(fields)</flags>\n"
  }
}
