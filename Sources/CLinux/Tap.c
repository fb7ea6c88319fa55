#define _GNU_SOURCE
#include "CLinux.h"
#include <linux/if.h>
#include <linux/if_tun.h>
#include <string.h>
#include <sys/ioctl.h>

int clinux_tap_attach(int file, const char *name, int header) {
  struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
  strncpy(request.ifr_name, name, IFNAMSIZ - 1);
  if (ioctl(file, TUNSETIFF, &request) < 0) return -1;
  return ioctl(file, TUNSETVNETHDRSZ, &header) < 0 ? -1 : 0;
}

int clinux_tap_offload(int file, unsigned offloads) { return ioctl(file, TUNSETOFFLOAD, (unsigned long)offloads); }
