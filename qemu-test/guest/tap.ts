/**
 * A TAP interface with offloads (Documentation/networking/tuntap.rst, IFF_VNET_HDR and TUNSETOFFLOAD): a `virtio_net_hdr` stands in front of each
 * frame, and TCP comes, and may be given, in packets of up to 64 KiB with checksums left open. It gives a process that drives a NIC the TCP of
 * the kernel.
 */
import { constants as os } from 'node:os';
import { close, readNow, systemError, writeNow } from '../../src/sys/libc.ts';
import { type MappedMemory, mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';
import { openTun, TunOffload } from '../../src/sys/tun.ts';

const OFFLOADS = TunOffload.checksum | TunOffload.tso4 | TunOffload.tso6 | TunOffload.tsoEcn;
/** The longest packet with its link header, and the header in front of it. */
const BUFFER = 128 * 1024;
/** struct virtio_net_hdr, in the order of the machine: flags u8, gso_type u8, then these as u16. */
const HEADER_BYTES = 10;
const Word = { headerLength: 1, gsoSize: 2, checksumStart: 3, checksumOffset: 4 } as const;
const FLAG_NEEDS_CSUM = 1;

/** What a `virtio_net_hdr` says. A GSO type of 0 is a packet that stands for itself. */
export interface TapOffload {
  needsChecksum: boolean;
  checksumStart: number;
  checksumOffset: number;
  gsoType: number;
  gsoSize: number;
  /** Bytes of all headers, of a packet with a GSO type. */
  headerLength: number;
}

export function noOffload(): TapOffload {
  return { needsChecksum: false, checksumStart: 0, checksumOffset: 0, gsoType: 0, gsoSize: 0, headerLength: 0 };
}

export class Tap {
  readonly #fd: number;
  readonly #memory: MappedMemory;
  /** What is sent: a frame that was received may wait meanwhile. */
  readonly #sending: MappedMemory;
  /** Of the frame that was received last. */
  readonly offload = noOffload();

  /** Makes interface `name`, in the network namespace of this process. It lives as long as this object. */
  constructor(name: string) {
    this.#fd = openTun(name, { kind: 'tap', vnetHeader: true, offload: OFFLOADS });
    this.#memory = mapAnonymous(BUFFER);
    this.#sending = mapAnonymous(BUFFER);
  }

  /** The next frame that the kernel sends; `offload` is about it. A view that the next call of this overwrites. Undefined when there is none now. */
  receive(): Uint8Array | undefined {
    const { u8, u16, address } = this.#memory;
    const length = readNow(this.#fd, address, BUFFER);
    if (length === -os.errno.EAGAIN) return undefined;
    if (length < 0) throw systemError('read', -length);
    const { offload } = this;
    offload.needsChecksum = (u8[0] & FLAG_NEEDS_CSUM) !== 0;
    offload.gsoType = u8[1];
    offload.headerLength = u16[Word.headerLength];
    offload.gsoSize = u16[Word.gsoSize];
    offload.checksumStart = u16[Word.checksumStart];
    offload.checksumOffset = u16[Word.checksumOffset];
    return u8.subarray(HEADER_BYTES, length);
  }

  /** Gives the kernel a frame; false when it does not take it (the interface is down). */
  send(frame: Uint8Array, offload: TapOffload): boolean {
    const { u8, u16, address } = this.#sending;
    u8[0] = offload.needsChecksum ? FLAG_NEEDS_CSUM : 0;
    u8[1] = offload.gsoType;
    u16[Word.headerLength] = offload.headerLength;
    u16[Word.gsoSize] = offload.gsoSize;
    u16[Word.checksumStart] = offload.checksumStart;
    u16[Word.checksumOffset] = offload.checksumOffset;
    u8.set(frame, HEADER_BYTES);
    const done = writeNow(this.#fd, address, HEADER_BYTES + frame.length);
    if (done >= 0) return true;
    if (done === -os.errno.EIO) return false;
    throw systemError('write', -done);
  }

  close(): void {
    close(this.#fd);
    unmapMemory(this.#memory);
    unmapMemory(this.#sending);
  }
}
