/**
 * A TUN interface (Documentation/networking/tuntap.rst): the kernel's IP packets come out of a descriptor, and packets
 * written to it arrive as if from a network. It gives a process that drives a NIC real applications.
 */
import { constants as os } from 'node:os';
import { close, readNow, systemError, writeNow } from '../../src/sys/libc.ts';
import { openTun } from '../../src/sys/tun.ts';

export class Tun {
  readonly fd: number;

  /** Makes interface `name`, in the network namespace of this process. It lives as long as this object. */
  constructor(name: string) {
    this.fd = openTun(name, { kind: 'tun' });
  }

  /** Writes the next packet that the kernel sends to `address`; returns its length, 0 when there is none now. */
  receive(address: number, room: number): number {
    const length = readNow(this.fd, address, room);
    if (length >= 0) return length;
    if (length === -os.errno.EAGAIN) return 0;
    throw systemError('read', -length);
  }

  /** Gives the kernel a packet; false when it does not take it (the interface is down, the packet is no IP). */
  send(address: number, length: number): boolean {
    return writeNow(this.fd, address, length) >= 0;
  }

  close(): void {
    close(this.fd);
  }
}
