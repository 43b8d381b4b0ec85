/**
 * TUN and TAP interfaces (Documentation/networking/tuntap.rst, linux/if_tun.h): what the kernel sends on the interface is read from a
 * descriptor, one packet a call, and what is written there has arrived on it. A TAP carries Ethernet frames, a TUN IP packets.
 *
 * Left out: several queues, the interface's addresses and state, which are for `ip` to set.
 */
import { constants as os } from 'node:os';
import { SystemError } from '../errors.ts';
import { close, ioctl, OpenFlag, open, systemError } from './libc.ts';
import { mapAnonymous, unmapMemory } from './memory.ts';

const DEVICE = '/dev/net/tun';
/** linux/if_tun.h: `_IOW('T', 202, int)`, `_IOW('T', 208, unsigned int)`. */
const Request = { setInterface: 0x400454ca, setOffload: 0x400454d0 } as const;
const InterfaceFlag = { tun: 0x0001, tap: 0x0002, noPacketInfo: 0x1000, vnetHeader: 0x4000 } as const;
/** struct ifreq, linux/if.h: name[IFNAMSIZ] with its NUL, flags u16. */
const InterfaceRequest = { name: 0, flags: 16, size: 40 } as const;
const IFNAMSIZ = 16;

/** `TUN_F_*`: what the reader finishes itself. All but `none` need `vnetHeader`. */
export const TunOffload = { none: 0, checksum: 0x01, tso4: 0x02, tso6: 0x04, tsoEcn: 0x08 } as const;

/** EBADFD, of a descriptor whose interface was deleted. Node does not know it. */
export const INTERFACE_GONE = 77;

export interface TunOptions {
  readonly kind: 'tun' | 'tap';
  /** Each packet has a `virtio_net_hdr` of 10 bytes in front (IFF_VNET_HDR). Default false. */
  readonly vnetHeader?: boolean;
  /** Sum of `TunOffload`. Default `none`, also where someone else has set another before. */
  readonly offload?: number;
}

/** Whether Linux takes `name` for an interface (`dev_valid_name`) and takes it for what it says: `%` would make it a pattern. */
export function isInterfaceName(name: string): boolean {
  return /^[!-~]+$/.test(name) && !/[/:%]/.test(name) && name !== '.' && name !== '..' && name.length < IFNAMSIZ;
}

/**
 * Attaches to interface `name` in the network namespace of this process; returns the descriptor, close-on-exec and non-blocking. Where there is
 * no such interface it comes into being, down and without addresses, and goes with the descriptor. Throws SystemError with a hint: `EINVAL` (also
 * for a name that is none), `EBUSY`, `EPERM`, `EACCES`, `ENOENT`.
 */
export function openTun(name: string, options: TunOptions): number {
  const { kind } = options;
  if (!isInterfaceName(name)) {
    throw new SystemError(
      'TUNSETIFF',
      os.errno.EINVAL,
      'EINVAL',
      `${JSON.stringify(name)} is no name of an interface`,
      {
        hint: `a name has 1 to ${IFNAMSIZ - 1} visible ASCII characters, none of them / : or %`,
      },
    );
  }
  const fd = explained(() => open(DEVICE, OpenFlag.readWrite | OpenFlag.nonblock), openHint);
  try {
    explained(
      () => attach(fd, name, InterfaceFlag[kind] | (options.vnetHeader === true ? InterfaceFlag.vnetHeader : 0)),
      (errno) => attachHint(errno, name, kind),
    );
    ioctl(fd, Request.setOffload, options.offload ?? TunOffload.none);
    return fd;
  } catch (error) {
    close(fd);
    throw error;
  }
}

function attach(fd: number, name: string, flags: number): void {
  const memory = mapAnonymous(InterfaceRequest.size);
  try {
    new TextEncoder().encodeInto(name, memory.u8);
    memory.u16[InterfaceRequest.flags / 2] = flags | InterfaceFlag.noPacketInfo;
    ioctl(fd, Request.setInterface, memory.address);
  } finally {
    unmapMemory(memory);
  }
}

function openHint(errno: number): string | undefined {
  if (errno === os.errno.EACCES || errno === os.errno.EPERM) return `${DEVICE} is not open to this user`;
  // ENODEV and ENXIO: the file is there, the driver is not.
  const isMissing = errno === os.errno.ENOENT || errno === os.errno.ENODEV || errno === os.errno.ENXIO;
  return isMissing ? `there is no ${DEVICE}: load the module tun; a container needs --device ${DEVICE}` : undefined;
}

function attachHint(errno: number, name: string, kind: 'tun' | 'tap'): string | undefined {
  if (errno === os.errno.EPERM) {
    return `it needs CAP_NET_ADMIN, or an interface of this user: ip tuntap add dev ${name} mode ${kind} user USER`;
  }
  if (errno === os.errno.EBUSY) return `another process is attached to ${name}`;
  return errno === os.errno.EINVAL
    ? `${name} is there, but not as a ${kind} with one queue: see ip -d link`
    : undefined;
}

/** Does `work`; a system call that fails gets the hint that belongs to its errno. */
function explained<T>(work: () => T, hintOf: (errno: number) => string | undefined): T {
  try {
    return work();
  } catch (error) {
    const hint = error instanceof SystemError ? hintOf(error.errno) : undefined;
    if (!(error instanceof SystemError) || hint === undefined) throw error;
    throw systemError(error.syscall, error.errno, { hint });
  }
}
