// A module with state: counts its calls.
static unsigned long calls;
unsigned long module_run(unsigned long argument) { return ++calls + argument; }
