// A module with a table of functions, which relocations fill in, and two sections of code.
static unsigned long plus(unsigned long x) { return x + 3; }
__attribute__((section(".text.more"))) static unsigned long times(unsigned long x) { return x * 5; }
static unsigned long (*volatile table[])(unsigned long) = {plus, times};
unsigned long module_run(unsigned long argument) { return table[1](table[0](argument)); }
