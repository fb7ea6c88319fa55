// A module that calls the kernel, with read-only data.
unsigned long kernel_service(const char *text, unsigned long count);
static const char text[] = "greeter: a module says hello\n";
unsigned long module_run(unsigned long argument) { return kernel_service(text, sizeof text - 1) + argument; }
