/**
 * The other end of an SA: software ESP and AH, which protects what the device must open and opens what the device has
 * protected (RFC 4302, RFC 4303).
 */
import { SoftwareIpsec } from '../fallback/software.ts';
import { Verdict, verdictNames } from '../fallback/verdict.ts';
import type { SecurityAssociation } from '../ipsec/sa.ts';
import { Ethernet } from '../packet/fields.ts';
import { PacketPool } from '../packet/pool.ts';
import { mapAnonymous, unmapMemory } from '../sys/memory.ts';

const SLOT = 4096;
const SLOTS = 4;

export class Judge {
  readonly #memory = mapAnonymous(SLOT * SLOTS);
  readonly #pool = new PacketPool(this.#memory, { stride: SLOT, headroom: 256 });
  readonly #ipsec = new SoftwareIpsec(this.#pool);
  readonly #packet = new Uint32Array(1);
  readonly #verdict = new Uint8Array(1);
  #handles = 0;

  /** Knows an SA from now on; returns its handle. */
  add(sa: SecurityAssociation): number {
    const handle = ++this.#handles;
    this.#ipsec.add(handle, sa);
    return handle;
  }

  /** Protects a frame with the outbound SA `handle`. Throws RangeError when that cannot be done. */
  protect(frame: Uint8Array, handle: number): Uint8Array {
    return this.#with(frame, (packet) => {
      this.#pool.sa[packet] = handle;
      this.#ipsec.protect(this.#packet, 1, Ethernet.length, this.#verdict);
      if (this.#verdict[0] !== Verdict.ok) throw new RangeError(`cannot protect: ${verdictNames[this.#verdict[0]]}`);
      return this.#pool.read(packet);
    });
  }

  /** Opens a frame: what was in it, or why not. */
  open(frame: Uint8Array): { readonly verdict: string; readonly frame: Uint8Array | null } {
    return this.#with(frame, (packet) => {
      this.#ipsec.unprotect(this.#packet, 1, Ethernet.length, this.#verdict);
      const ok = this.#verdict[0] === Verdict.ok;
      return { verdict: verdictNames[this.#verdict[0]], frame: ok ? this.#pool.read(packet) : null };
    });
  }

  #with<T>(frame: Uint8Array, work: (packet: number) => T): T {
    this.#pool.allocate(this.#packet, 1);
    try {
      this.#pool.write(this.#packet[0], frame);
      return work(this.#packet[0]);
    } finally {
      this.#pool.free(this.#packet, 1);
    }
  }

  close(): void {
    this.#ipsec.close();
    unmapMemory(this.#memory);
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
