/**
 * A TUN interface (Documentation/networking/tuntap.rst): the kernel's IP packets come out of a descriptor, and packets
 * written to it arrive as if from a network. It gives a process that drives a NIC real applications: ping, TCP.
 */
import { constants as os } from 'node:os';
import { SystemError } from '../../src/errors.ts';
import { ffi } from '../../src/sys/ffi/ffi.ts';
import type { Watch } from '../../src/sys/ffi/provider.ts';
import { close, readNow, systemError, write } from '../../src/sys/libc.ts';
import { type MappedMemory, mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';
import { openTun } from '../../src/sys/tun.ts';

const BUFFER = 65536;

export class Tun {
  readonly #fd: number;
  readonly #memory: MappedMemory;

  /** Makes interface `name`, in the network namespace of this process. It lives as long as this object. */
  constructor(name: string) {
    this.#fd = openTun(name, { kind: 'tun' });
    this.#memory = mapAnonymous(BUFFER);
  }

  /** The next packet that the kernel sends; a view that the next call overwrites. Undefined when there is none now. */
  receive(): Uint8Array | undefined {
    const length = readNow(this.#fd, this.#memory.address, BUFFER);
    if (length >= 0) return this.#memory.u8.subarray(0, length);
    if (length === -os.errno.EAGAIN) return undefined;
    throw systemError('read', -length);
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
