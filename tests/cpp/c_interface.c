// The public header and the library used from C.
#include <string.h>

#include "sla2/sla2.h"

// 0 when a call with an empty struct is refused with a message.
int check_from_c(void) {
  sla2_route_params params;
  size_t bytes = 0;
  memset(&params, 0, sizeof(params));
  if (sla2_route_workspace(&params, &bytes) != SLA2_INVALID_ARGUMENT) return 1;
  return strlen(sla2_last_error()) > 0 ? 0 : 1;
}
