/**
 * A TUN interface (Documentation/networking/tuntap.rst): the kernel's IP packets come out of a descriptor, and packets
 * written to it arrive as if from a network. It gives a process that drives a NIC real applications: ping, TCP.
 */
import { constants as os } from 'node:os';
import { SystemError } from '../../src/errors.ts';
import { ffi } from '../../src/sys/ffi/ffi.ts';
import type { NativeFunction, Watch } from '../../src/sys/ffi/provider.ts';
import { close, ioctl, OpenFlag, open, systemError, write } from '../../src/sys/libc.ts';
import { type MappedMemory, mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';

const DEVICE = '/dev/net/tun';
/** linux/if_tun.h: `_IOW('T', 202, int)`; IP packets without a header of their own. */
const TUNSETIFF = 0x400454ca;
const IFF_TUN = 0x0001;
const IFF_NO_PI = 0x1000;
/** struct ifreq: name[16], flags u16. */
const FLAGS_AT = 16;
const BUFFER = 65536;

export class Tun {
  readonly #fd: number;
  readonly #memory: MappedMemory;
  /** Not the one of libc.ts: that there is no packet is no error here. */
  readonly #read: NativeFunction;

  /** Makes interface `name`, in the network namespace of this process. It lives as long as this object. */
  constructor(name: string) {
    this.#fd = open(DEVICE, OpenFlag.readWrite | OpenFlag.nonblock);
    this.#memory = mapAnonymous(BUFFER);
    this.#read = ffi().open(null).func('read', 'i64', ['i32', 'i64', 'u64']);
    new TextEncoder().encodeInto(name, this.#memory.u8);
    this.#memory.u16[FLAGS_AT / 2] = IFF_TUN | IFF_NO_PI;
    ioctl(this.#fd, TUNSETIFF, this.#memory.address);
  }

  /** The next packet that the kernel sends; a view that the next call overwrites. Undefined when there is none now. */
  receive(): Uint8Array | undefined {
    const length = this.#read(this.#fd, this.#memory.address, BUFFER);
    if (length >= 0) return this.#memory.u8.subarray(0, length);
    const errno = ffi().errno();
    if (errno === os.errno.EAGAIN) return undefined;
    throw systemError('read', errno);
  }

  /** Calls `onReadable` when there is a packet, until the result is closed. */
  watch(onReadable: () => void): Watch {
    return ffi().watch(this.#fd, onReadable);
  }

  /** Gives the kernel a packet; false when it does not take it (the interface is down, the packet is no IP). */
  send(packet: Uint8Array): boolean {
    this.#memory.u8.set(packet);
    try {
      write(this.#fd, this.#memory.address, packet.length);
      return true;
    } catch (error) {
      if (error instanceof SystemError) return false;
      throw error;
    }
  }

  close(): void {
    close(this.#fd);
    unmapMemory(this.#memory);
  }
}
