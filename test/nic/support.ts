/** A NIC's transmit queue with SAs, over a ring that keeps copies of what is sent. */
import { VirtioError } from '../../src/errors.ts';
import { SoftwareIpsec } from '../../src/fallback/software.ts';
import { IpsecManager } from '../../src/ipsec/manager.ts';
import { NonceGuard, NonceMemory } from '../../src/ipsec/nonce-guard.ts';
import { NicTxQueue, type TxRing } from '../../src/nic/tx-queue.ts';
import { PacketFlag, PacketPool } from '../../src/packet/pool.ts';
import { mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';
import type { Large } from '../device/helpers/large.ts';

export interface Sent {
  readonly packet: number;
  readonly sa: number;
  readonly flags: number;
  readonly bytes: Uint8Array;
}

export class CopyRing implements TxRing {
  readonly counters = new Float64Array(8);
  readonly sent: Sent[] = [];
  broken: VirtioError | null = null;
  readonly size: number;
  room: number;
  readonly #pool: PacketPool;
  readonly #out: number[] = [];

  constructor(pool: PacketPool, size: number) {
    this.#pool = pool;
    this.size = size;
    this.room = size;
  }

  burst(packets: Uint32Array, n: number): number {
    const taken = Math.min(n, this.room);
    const { sa, flags } = this.#pool;
    for (const packet of packets.subarray(0, taken)) {
      this.sent.push({ packet, sa: sa[packet], flags: flags[packet], bytes: this.#pool.readChain(packet) });
      this.#out.push(packet);
    }
    this.room -= taken;
    return taken;
  }

  /** Nothing comes back by itself. */
  reclaim(): number {
    return 0;
  }

  /** The device is done with everything. */
  complete(): void {
    const done = Uint32Array.from(this.#out.splice(0));
    this.#pool.freeChains(done, done.length);
    this.room = this.size;
  }

  enableInterrupts(): boolean {
    return false;
  }
  disableInterrupts(): void {}
}

export interface TxSetup {
  readonly pool: PacketPool;
  readonly manager: IpsecManager;
  readonly ring: CopyRing;
  readonly tx: NicTxQueue;
  /** A chain of slots with a large packet, for SA `handle`; `room` bytes in each. */
  make(one: Large, handle: number, room?: number): number;
  close(): void;
}

export function txSetup(options: { packets?: number; ring?: number; mtu?: number; references?: number } = {}): TxSetup {
  const { packets = 512, ring: size = 512, mtu = 1500 } = options;
  const memory = mapAnonymous(packets * 2048);
  const { references = 0 } = options;
  const pool = new PacketPool(memory, { stride: 2048, headroom: 128, references });
  const manager = new IpsecManager({
    inline: null,
    inlineObstacle: 'no device',
    software: (onEvent) => new SoftwareIpsec(pool, { engine: 'noble', onEvent }),
    guard: new NonceGuard({ memory: new NonceMemory() }),
    mtu,
    handles: 64,
  });
  const ring = new CopyRing(pool, size);
  const tx = new NicTxQueue(ring, pool, manager);
  return {
    ...{ pool, manager, ring, tx },
    make: ({ frame, header }, handle, room = 1800) => {
      const slots = new Uint32Array(Math.ceil(frame.length / room));
      if (pool.allocate(slots, slots.length) !== slots.length) throw new Error('the pool is empty');
      for (const [i, p] of slots.entries()) {
        pool.write(p, frame.subarray(i * room, (i + 1) * room));
        if (i > 0) pool.next[slots[i - 1]] = p;
      }
      const [p] = slots;
      pool.sa[p] = handle;
      pool.flags[p] = PacketFlag.needsChecksum | PacketFlag.segmented;
      pool.checksumStart[p] = header.csumStart ?? 0;
      pool.checksumOffset[p] = header.csumOffset ?? 0;
      pool.gsoType[p] = header.gsoType ?? 0;
      pool.gsoSize[p] = header.gsoSize ?? 0;
      pool.outerTransport[p] = header.outerThOffset ?? 0;
      pool.innerNetwork[p] = header.innerNhOffset ?? 0;
      return p;
    },
    close: () => {
      manager.close(new VirtioError('NIC_CLOSED', 'closed'));
      unmapMemory(memory);
    },
  };
}
