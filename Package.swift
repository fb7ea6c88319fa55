// swift-tools-version: 6.2
import PackageDescription

// Sources and Tests mirror docs/DESIGN.md's map: a target depends only on targets below it,
// and `swift build --explicit-target-dependency-import-check error` enforces it.

let strict: [SwiftSetting] = [
  .treatAllWarnings(as: .error),
  .enableUpcomingFeature("ExistentialAny"),
  .enableUpcomingFeature("MemberImportVisibility"),
]

/// Debug builds of the interpreter are two orders of magnitude slower: hot targets are always optimised, as a whole.
let hot: [SwiftSetting] =
  strict + [
    // What these targets change belongs to one thread by design; the checks cost a sixth of the time.
    .unsafeFlags(["-enforce-exclusivity=unchecked"]),
    .unsafeFlags(
      ["-O", "-disable-batch-mode", "-whole-module-optimization", "-num-threads", "2"], .when(configuration: .debug)),
  ]

func library(_ name: String, _ dependencies: [Target.Dependency] = [], settings: [SwiftSetting] = strict) -> Target {
  .target(name: name, dependencies: dependencies, swiftSettings: settings)
}

func tests(
  _ name: String, _ dependencies: [Target.Dependency], exclude: [String] = [], settings: [SwiftSetting] = strict
) -> Target {
  .testTarget(name: name, dependencies: dependencies, exclude: exclude, swiftSettings: settings)
}

/// Fuzzers need libFuzzer's instrumentation everywhere, so they are no part of other builds: see scripts/fuzz.
func fuzzer(_ name: String, _ dependencies: [Target.Dependency]) -> Target {
  .executableTarget(name: name, dependencies: dependencies + ["CFuzz"], path: "Fuzz/" + name, swiftSettings: strict)
}

let fuzzers: [Target] =
  Context.environment["SWIFTVMM_FUZZ"] == nil
  ? []
  : [
    .target(name: "CFuzz", path: "Fuzz/CFuzz"),
    .executableTarget(
      name: "RandomCPU", dependencies: ["RandomCode"], path: "Fuzz/RandomCPU", swiftSettings: strict),
    fuzzer("FuzzAgent", ["GuestAgent", "JSON"]),
    fuzzer("FuzzBoot", ["Accelerator", "Boot", "GuestMemory"]),
    fuzzer("FuzzCPU", ["RandomCode"]),
    fuzzer("FuzzGDB", ["Accelerator", "GDBStub", "Host"]),
    fuzzer("FuzzMigration", ["GuestMemory", "Host", "Migration", "StateTree"]),
    fuzzer("FuzzNBD", ["BlockLayer", "NBD"]),
    fuzzer("FuzzNet", ["Host", "NetLayer"]),
    fuzzer("FuzzQMP", ["JSON", "Monitor"]),
    fuzzer("FuzzQcow2", ["BlockLayer"]),
    fuzzer("FuzzSave", ["GuestMemory", "SavedMachine", "StateTree"]),
  ]

let package = Package(
  name: "swiftvmm",
  products: [.executable(name: "swiftvmm", targets: ["swiftvmm"])],
  dependencies: [
    .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
    .package(url: "https://github.com/apple/swift-nio", from: "2.101.2"),
  ],
  targets: [
    // The kernel's interfaces and other C.
    .target(name: "CLinux"),
    .systemLibrary(name: "CElf", providers: [.apt(["libelf-dev"])]),
    .systemLibrary(name: "CCompression", providers: [.apt(["zlib1g-dev", "libzstd-dev"])]),
    .systemLibrary(name: "COpenSSL", providers: [.apt(["libssl-dev"])]),
    .target(name: "CFirmware", path: "firmware"),
    // The loops of the guest `cpu`, for the physical CPU.
    .target(name: "CLoops", path: "guests/cpu", exclude: ["cpu.swift"]),

    // Below every accelerator and device.
    library("Host", ["CLinux"]),
    // Encrypted streams.
    .target(
      name: "TLS", dependencies: ["COpenSSL", "Host"], swiftSettings: strict,
      linkerSettings: [.linkedLibrary(":libssl.a"), .linkedLibrary(":libcrypto.a")]),
    library("GuestMemory", ["Host", "CLinux"]),
    library("StateTree"),
    library("JSON"),
    library("MemoryViews", ["GuestMemory"], settings: hot),
    library("Accelerator", ["GuestMemory", "MemoryViews", "StateTree"]),
    library("X86", settings: hot),
    .target(name: "CSoftCPU"),
    library(
      "SoftAccelerator", ["Accelerator", "CSoftCPU", "GuestMemory", "Host", "MemoryViews", "StateTree", "X86"],
      settings: hot),
    library("KVMAccelerator", ["Accelerator", "CLinux", "GuestMemory", "Host", "MemoryViews", "StateTree", "X86"]),

    // In which order the pages of a machine are sent elsewhere. It looks at every page: always optimised.
    library("PageClasses", ["CLinux", "GuestMemory", "MemoryViews", "X86"], settings: hot),

    // Policies on top of views. Signatures are checked here: always optimised.
    library(
      "LoaderHardening", ["Accelerator", "GuestMemory", "Host", "JSON", "MemoryViews", "StateTree"], settings: hot),

    // Disks. Tables are looked up for every request: always optimised.
    .target(
      name: "BlockLayer", dependencies: ["CCompression", "CLinux", "Host", "TLS"], swiftSettings: hot,
      linkerSettings: [.linkedLibrary(":libz.a"), .linkedLibrary(":libzstd.a")]),

    library("NBD", ["BlockLayer", "Host", "TLS"]),

    // Networks. Every frame of a switch passes here: always optimised.
    library("NetLayer", ["CLinux", "Host"], settings: hot),

    // What the agent in a guest says.
    library("GuestAgent", ["JSON", "PageClasses"]),

    // Machines in files.
    .target(
      name: "SavedMachine", dependencies: ["CCompression", "GuestMemory", "Host", "StateTree"], swiftSettings: strict,
      linkerSettings: [.linkedLibrary(":libz.a")]),

    // Machines on their way to another process. It copies and compares pages: always optimised.
    .target(
      name: "Migration", dependencies: ["CCompression", "GuestMemory", "Host", "PageClasses", "StateTree", "TLS"],
      swiftSettings: hot, linkerSettings: [.linkedLibrary(":libz.a"), .linkedLibrary(":libzstd.a")]),

    // The machine.
    library("DeviceModel", ["GuestMemory", "StateTree"]),
    library("PlatformDevices", ["Accelerator", "DeviceModel", "GuestMemory", "Host", "StateTree"]),
    library(
      "Virtio",
      ["BlockLayer", "CLinux", "DeviceModel", "GuestMemory", "Host", "NetLayer", "PlatformDevices", "StateTree"]),
    library("Boot", ["Accelerator", "CElf", "CFirmware", "GuestMemory", "Host"]),
    library(
      "Machine",
      [
        "Accelerator", "BlockLayer", "Boot", "DeviceModel", "GuestMemory", "Host", "MemoryViews", "NetLayer",
        "PlatformDevices", "StateTree", "Virtio", "X86",
      ]),

    // Its faces.
    library("GDBStub", ["Accelerator", "Host"]),
    library(
      "Monitor",
      [
        "Host", "JSON", .product(name: "NIOCore", package: "swift-nio"),
        .product(name: "NIOPosix", package: "swift-nio"),
      ]),
    .executableTarget(
      name: "swiftvmm",
      dependencies: [
        "Accelerator", "BlockLayer", "Boot", "CLinux", "CLoops", "DeviceModel", "GDBStub", "GuestAgent", "GuestMemory",
        "Host", "JSON", "KVMAccelerator", "LoaderHardening", "Machine", "MemoryViews", "Migration", "Monitor", "NBD",
        "NetLayer", "PageClasses", "PlatformDevices", "SavedMachine", "SoftAccelerator", "StateTree", "TLS", "Virtio",
        .product(name: "ArgumentParser", package: "swift-argument-parser"),
      ], swiftSettings: strict,
      // The toolchain's own linker: what it links starts a millisecond sooner than what gold, the default, does. Another one is
      // saved by relocations that are packed, symbols that nobody else looks for, and libraries inside (scripts/link).
      linkerSettings: [
        .unsafeFlags(
          ["-use-ld=lld", "-L", Context.packageDirectory + "/scripts/link"]
            + ["-z", "pack-relative-relocs", "--no-export-dynamic"].flatMap { ["-Xlinker", $0] })
      ]),

    tests("HostTests", ["Host"]),
    // What the tests of encrypted streams need.
    .target(name: "TestCertificates", path: "Tests/Support/TestCertificates"),
    // Connections that are cut.
    .target(
      name: "TestRelay", dependencies: ["Host"], path: "Tests/Support/TestRelay", swiftSettings: strict),
    tests("TLSTests", ["Host", "TLS", "TestCertificates"]),
    tests("GuestMemoryTests", ["GuestMemory", "Host"]),
    tests("MemoryViewsTests", ["GuestMemory", "MemoryViews"]),
    tests("PageClassesTests", ["GuestMemory", "MemoryViews", "PageClasses"]),
    tests("StateTreeTests", ["StateTree"]),
    tests(
      "MigrationTests",
      [
        "GuestMemory", "Host", "MemoryViews", "Migration", "PageClasses", "StateTree", "TLS", "TestCertificates",
        "TestRelay",
      ]),
    tests("SavedMachineTests", ["GuestMemory", "Host", "SavedMachine", "StateTree"]),
    tests("JSONTests", ["JSON"]),
    tests("X86Tests", ["X86"]),
    tests(
      "LoaderHardeningTests",
      [
        "Accelerator", "GuestMemory", "KVMAccelerator", "LoaderHardening", "MemoryViews", "SoftAccelerator",
        "StateTree",
      ]),
    // The physical CPU, an instruction at a time.
    .target(name: "NativeRunner", path: "Tests/Support/NativeRunner"),
    // Random code and states for the software CPU.
    .target(
      name: "RandomCode", dependencies: ["Accelerator", "GuestMemory", "MemoryViews", "SoftAccelerator", "X86"],
      path: "Tests/Support/RandomCode", swiftSettings: hot),
    tests(
      "SoftAcceleratorTests",
      ["Accelerator", "CSoftCPU", "GuestMemory", "NativeRunner", "RandomCode", "SoftAccelerator", "X86"],
      settings: hot),
    // The same in a process of its own, whatever the instruction does.
    .target(
      name: "NativeProcess", path: "Tests/Support/NativeProcess", cSettings: [.unsafeFlags(["-O2"])]),
    tests(
      "DifferentialTests", ["Accelerator", "CSoftCPU", "NativeProcess", "SoftAccelerator", "X86"], settings: hot),
    tests("BootTests", ["Accelerator", "Boot", "GuestMemory", "Host"]),
    // A clock, a machine and an interrupt sink in the test's hand.
    .target(
      name: "DeviceTesting", dependencies: ["DeviceModel", "GuestMemory", "PlatformDevices"],
      path: "Tests/DeviceTesting", swiftSettings: strict),
    tests(
      "PlatformDevicesTests",
      ["Accelerator", "DeviceModel", "DeviceTesting", "GuestMemory", "PlatformDevices", "StateTree"]),
    tests(
      "DeviceConformance",
      [
        "DeviceModel", "DeviceTesting", "GuestMemory", "Host", "NetLayer", "PlatformDevices", "StateTree", "Virtio",
      ]),
    .target(name: "TestGuests", path: "Tests/Support/TestGuests"),
    tests(
      "AcceleratorConformance",
      [
        "Accelerator", "GuestMemory", "Host", "KVMAccelerator", "MemoryViews", "SoftAccelerator", "StateTree",
        "TestGuests",
      ]),
    tests(
      "MachineTests",
      [
        "Accelerator", "Boot", "DeviceModel", "GuestMemory", "Host", "KVMAccelerator", "Machine", "PlatformDevices",
        "SoftAccelerator", "StateTree",
      ]),
    tests("BlockLayerTests", ["BlockLayer", "Host"]),
    tests("NBDTests", ["BlockLayer", "Host", "NBD", "TLS", "TestCertificates"]),
    tests(
      "VirtioTests",
      [
        "BlockLayer", "DeviceModel", "DeviceTesting", "GuestMemory", "Host", "NetLayer", "PlatformDevices", "StateTree",
        "Virtio",
      ]),
    tests("NetLayerTests", ["CLinux", "Host", "NetLayer"]),
    tests("GDBStubTests", ["Accelerator", "GDBStub", "Host"]),
    tests("GuestAgentTests", ["GuestAgent", "JSON", "PageClasses"]),
    tests("MonitorTests", ["Host", "JSON", "Monitor"]),
    tests("GuestTests", ["Boot", "Host", "NetLayer", "TestCertificates", "TestRelay"], exclude: ["Fixtures"]),
  ] + fuzzers
)
