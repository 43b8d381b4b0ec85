/** Our side of the table: one SA, one packet at a time, through `SoftwareIpsec`. */

import { SoftwareIpsec } from '../../src/fallback/software.ts';
import { Verdict, verdictNames } from '../../src/fallback/verdict.ts';
import { validateSa } from '../../src/ipsec/validate.ts';
import { PacketPool } from '../../src/packet/pool.ts';
import { mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';
import type { SaText } from './matrix.ts';
import '../equality.ts';

const HANDLE = 1;

export class Ours implements Disposable {
  readonly #memory = mapAnonymous(1 << 16);
  readonly #pool = new PacketPool(this.#memory, { stride: 4096 });
  readonly #ipsec = new SoftwareIpsec(this.#pool);
  readonly #packets = new Uint32Array(1);
  readonly #verdicts = new Uint8Array(1);

  /** What we put on the wire for `packet`. Throws when our side drops it. */
  protect(sa: SaText, packet: Uint8Array): Uint8Array {
    return this.#run({ ...sa, direction: 'outbound' }, packet);
  }

  /**
   * What we take out of `packet`. `initial.sequence` of the text is the number that the packet has; for an inbound SA the field is
   * the highest one accepted, so it is one less.
   */
  unprotect(sa: SaText, packet: Uint8Array): Uint8Array {
    const accepted = String(BigInt(sa.initial.sequence) - 1n);
    return this.#run({ ...sa, direction: 'inbound', initial: { sequence: accepted } }, packet);
  }

  #run(input: SaText & { direction: 'outbound' | 'inbound' }, packet: Uint8Array): Uint8Array {
    const ipsec = this.#ipsec;
    ipsec.add(HANDLE, validateSa(input));
    try {
      this.#pool.allocate(this.#packets, 1);
      const p = this.#packets[0];
      this.#pool.write(p, packet);
      if (input.direction === 'outbound') {
        this.#pool.sa[p] = HANDLE;
        ipsec.protect(this.#packets, 1, 0, this.#verdicts);
      } else ipsec.unprotect(this.#packets, 1, 0, this.#verdicts);
      const result = this.#pool.read(p);
      this.#pool.free(this.#packets, 1);
      if (this.#verdicts[0] !== Verdict.ok) throw new Error(`our verdict: ${verdictNames[this.#verdicts[0]]}`);
      return result;
    } finally {
      ipsec.remove(HANDLE);
    }
  }

  [Symbol.dispose](): void {
    this.#ipsec.close();
    unmapMemory(this.#memory);
  }
}
