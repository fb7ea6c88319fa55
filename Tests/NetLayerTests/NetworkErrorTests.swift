import NetLayer
import Testing

@Suite struct NetworkErrorTests {
  @Test func aMessageNamesTheValue() {
    #expect("\(NetworkError.tapInUse(name: "tap7"))".contains("tap7"))
  }
}
