import fc from 'fast-check';
import { beforeEach, describe, expect, it } from 'vitest';
import { VirtioError } from '../../src/errors.ts';
import { SoftwareIpsec } from '../../src/fallback/software.ts';
import { Verdict } from '../../src/fallback/verdict.ts';
import { IpsecManager } from '../../src/ipsec/manager.ts';
import { NonceGuard, NonceMemory } from '../../src/ipsec/nonce-guard.ts';
import { SaPlace } from '../../src/ipsec/sa-state.ts';
import { NicRxQueue, type RxRing } from '../../src/nic/rx-queue.ts';
import { NicTxQueue, type TxRing } from '../../src/nic/tx-queue.ts';
import { checksum } from '../../src/packet/checksum.ts';
import { PacketFlag, PacketPool } from '../../src/packet/pool.ts';
import { mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';
import { TxCounter } from '../../src/virtio-net/tx.ts';
import { inbound, key, outbound } from '../ipsec/support.ts';

const COUNT = 1024;

/** A ring that keeps what it is given until it is told to give it back, and receives what a test puts into it. */
class FakeRing implements TxRing, RxRing {
  readonly counters = new Float64Array(8);
  readonly sent: { packet: number; sa: number; frame: string }[] = [];
  readonly arriving: number[] = [];
  broken: VirtioError | null = null;
  room = 512;
  size = 512;
  hasChains = true;
  readonly #pool: PacketPool;

  constructor(pool: PacketPool) {
    this.#pool = pool;
  }

  networkHeader(): number {
    return 0;
  }

  burst(packets: Uint32Array, n: number): number {
    return this.arriving.length > 0 ? this.#receive(packets, n) : this.#transmit(packets, n);
  }

  #transmit(packets: Uint32Array, n: number): number {
    const taken = Math.min(n, this.room);
    for (const packet of packets.subarray(0, taken)) {
      const frame = Buffer.from(this.#pool.read(packet)).toString('hex');
      this.sent.push({ packet, sa: this.#pool.sa[packet], frame });
    }
    this.room -= taken;
    return taken;
  }

  #receive(out: Uint32Array, max: number): number {
    const now = this.arriving.splice(0, max);
    out.set(now);
    return now.length;
  }

  reclaim(): number {
    const done = Uint32Array.from(this.sent.splice(0), ({ packet }) => packet);
    this.#pool.free(done, done.length);
    this.room += done.length;
    return done.length;
  }

  enableInterrupts(): boolean {
    return false;
  }
  disableInterrupts(): void {}
}

const memory = mapAnonymous(COUNT * 2048);
/** The pool is new for each test; so is what the engines know of it. */
let pool: PacketPool;
let manager: IpsecManager;
let ring: FakeRing;
let tx: NicTxQueue;
let rx: NicRxQueue;

beforeEach(() => {
  pool = new PacketPool(memory, { stride: 2048, headroom: 128 });
  manager = new IpsecManager({
    inline: null,
    inlineObstacle: 'no device',
    software: (onEvent) => new SoftwareIpsec(pool, { engine: 'noble', onEvent }),
    guard: new NonceGuard({ memory: new NonceMemory() }),
    mtu: 1500,
    handles: 64,
  });
  ring = new FakeRing(pool);
  tx = new NicTxQueue(ring, pool, manager);
  rx = new NicRxQueue(0, ring, pool, manager);
  return () => manager.close(new VirtioError('NIC_CLOSED', 'closed'));
});

/** An Ethernet frame with an IPv4 UDP packet that carries `text`. */
function frame(text: string): Uint8Array {
  const body = Buffer.from(text);
  const out = Buffer.alloc(14 + 28 + body.length);
  out.write('020000000002020000000001080045000000000040004011', 'hex');
  out.writeUInt16BE(28 + body.length, 16);
  out.set([10, 0, 0, 1, 10, 0, 0, 2, 0x30, 0x39, 0, 53], 26);
  out.writeUInt16BE(8 + body.length, 38);
  out.set(body, 42);
  out.writeUInt16BE(0, 24);
  out.writeUInt16BE(checksum(out, 14, 20), 24);
  return out;
}

function packets(n: number, sa: (i: number) => number): Uint32Array {
  const out = new Uint32Array(n);
  expect(pool.allocate(out, n)).toBe(n);
  out.forEach((p, i) => {
    pool.write(p, frame(`number ${i}`));
    pool.sa[p] = sa(i);
  });
  return out;
}

/** An inline outbound SA without a device: what the data path knows of one. */
function inlineSa(handle: number): number {
  manager.state.add(handle, outbound(), SaPlace.inlineOutbound, 1400, null);
  return handle;
}

const hexOf = (text: string) => Buffer.from(text).toString('hex');
const otherKey = (first: number) =>
  ({ aead: { name: 'aes-gcm', key: key(16, first), salt: key(4), icvLength: 16 } }) as const;

describe('a transmit queue whose ring is full', () => {
  it('takes nothing, though the device makes room just then: nobody has looked at the packets', async () => {
    const soft = await manager.addSa(outbound());
    const handle = inlineSa(7);
    ring.room = 0;
    let looks = 0;
    // The device is done with all of it between the first look and the next.
    ring.reclaim = () => {
      looks++;
      return 0;
    };
    const { burst } = ring;
    ring.burst = (packets, n) => {
      ring.room = 512;
      return burst.call(ring, packets, n);
    };
    const four = packets(4, (i) => [handle, soft.handle][i % 2]);
    expect(tx.burst(four, 4)).toBe(0);
    expect(ring.sent).toEqual([]);
    expect([looks, ring.counters[TxCounter.ringFull]]).toEqual([1, 1]);
    expect(manager.state.packets[handle]).toBe(0);
    ring.room = 512;
    expect(tx.burst(four, 4)).toBe(4);
    expect(manager.state.packets[handle]).toBe(2);
    expect(soft.traffic().packets).toBe(2n);
  });
});

describe('a receive queue whose ring was reset', () => {
  it('has its interrupt again if it was asked for, and wakes who waits', () => {
    const calls: string[] = [];
    ring.enableInterrupts = () => calls.push('enable') < 0;
    const sleeper = { sleep: () => {}, wake: (pair: number) => calls.push(`wake ${pair}`) };
    const queue = new NicRxQueue(3, ring, pool, manager, { sleeper });
    queue.rearm();
    expect(calls.splice(0)).toEqual(['wake 3']);
    queue.enableInterrupts();
    queue.rearm();
    expect(calls.splice(0)).toEqual(['enable', 'enable', 'wake 3']);
    queue.disableInterrupts();
    queue.rearm();
    expect(calls).toEqual(['wake 3']);
  });
});

describe('the transmit queue of a NIC', () => {
  it('sends what asks for nothing as it is, and what names no SA not at all', () => {
    const burst = packets(4, (i) => (i === 2 ? 9 : 0));
    inlineSa(5);
    const free = pool.available;
    expect(tx.burst(burst, 4)).toBe(4);
    expect(ring.sent.map(({ packet }) => packet)).toEqual([burst[0], burst[1], burst[3]]);
    expect(tx.dropped[Verdict.noSa]).toBe(1);
    expect(pool.available).toBe(free + 1);
  });

  it('protects what asks for a software SA in place, in order, and marks it as done', async () => {
    const sa = await manager.addSa(outbound());
    const burst = packets(600, (i) => (i % 3 === 0 ? sa.handle : 0));
    ring.room = 1000;
    expect(tx.burst(burst, 600)).toBe(600);
    expect(ring.sent.map(({ packet }) => packet)).toEqual([...burst]);
    expect(ring.sent.every((one) => one.sa === 0)).toBe(true);
    ring.sent.forEach((one, i) => {
      expect(one.frame.includes(hexOf(`number ${i}`))).toBe(i % 3 !== 0);
      if (i % 3 === 0)
        expect(one.frame.slice(2 * 34, 2 * 42)).toBe(`00001000${(i / 3 + 1).toString(16).padStart(8, '0')}`);
    });
    expect(sa.traffic().packets).toBe(200n);
  });

  it('takes no more than the ring has room for, and leaves the others untouched', async () => {
    const sa = await manager.addSa(outbound());
    const burst = packets(40, () => sa.handle);
    ring.room = 10;
    expect(tx.burst(burst, 40)).toBe(10);
    expect(tx.burst(burst.subarray(10), 30)).toBe(10);
    expect(sa.traffic().packets).toBe(20n);
    for (const p of burst.subarray(20)) {
      expect(pool.sa[p]).toBe(sa.handle);
      expect(Buffer.from(pool.read(p)).toString('hex')).toContain(hexOf('number'));
    }
  });

  it('counts what goes out inline and leaves the tagging to the ring', () => {
    const handle = inlineSa(3);
    const burst = packets(5, () => handle);
    expect(tx.burst(burst, 5)).toBe(5);
    expect(ring.sent.every((one) => one.sa === handle)).toBe(true);
    expect(manager.state.packets[handle]).toBe(5);
    expect(manager.state.bytes[handle]).toBe(5 * (28 + 'number 0'.length));
  });

  it('drops what an SA cannot carry', async () => {
    const handle = inlineSa(30);
    const sa = await manager.addSa(outbound());
    const long = new Uint8Array(14 + 1480).fill(0x45);
    long.set(frame('x').subarray(0, 14));
    const burst = packets(3, (i) => (i === 0 ? handle : sa.handle));
    for (const p of burst) pool.write(p, long);
    pool.write(burst[2], Uint8Array.of(1, 2, 3));
    const free = pool.available;
    expect(tx.burst(burst, 3)).toBe(3);
    expect(ring.sent).toEqual([]);
    expect(pool.available).toBe(free + 3);
    expect(tx.dropped[Verdict.tooBig] + tx.dropped[Verdict.malformed]).toBe(3);
  });

  it('fills the checksum that was left to the device before it encrypts', async () => {
    const out = await manager.addSa(outbound());
    const inn = await manager.addSa(inbound());
    const [p] = packets(1, () => out.handle);
    const at = pool.offset[p];
    const udp = at + 34;
    // The pseudo header's sum stands in the field: 10.0.0.1, 10.0.0.2, protocol 17, length 16.
    pool.u8.set([0x14, 0x24], udp + 6);
    pool.flags[p] = PacketFlag.needsChecksum;
    pool.checksumStart[p] = 34;
    pool.checksumOffset[p] = 6;
    expect(tx.burst(Uint32Array.of(p), 1)).toBe(1);
    ring.sent.length = 0;
    pool.flags[p] = 0;
    ring.arriving.push(p);
    const got = new Uint32Array(4);
    expect(rx.burst(got, 4)).toBe(1);
    expect(pool.sa[p]).toBe(inn.handle);
    const bytes = Buffer.from(pool.read(p));
    const pseudo = Buffer.concat([bytes.subarray(26, 34), Buffer.of(0, 17, 0, 16), bytes.subarray(34)]);
    expect(checksum(pseudo, 0, pseudo.length)).toBe(0);
  });

  it('takes nothing when the ring is broken', async () => {
    const sa = await manager.addSa(outbound());
    const burst = packets(4, (i) => (i < 2 ? sa.handle : 0));
    ring.broken = new VirtioError('USED_ID', 'broken');
    expect(tx.burst(burst, 4)).toBe(0);
    expect(sa.traffic().packets).toBe(0n);
  });

  it('gives the pool back what was protected when the ring breaks under it', async () => {
    const sa = await manager.addSa(outbound());
    const burst = packets(8, () => sa.handle);
    const free = pool.available;
    ring.burst = (_packets, n) => Math.min(n, 3);
    expect(tx.burst(burst, 8)).toBe(8);
    expect(pool.available).toBe(free + 5);
    expect(tx.dropped[Verdict.engine]).toBe(5);
  });

  it('lets nothing into the ring that asked for protection and did not get it, whatever the mix', async () => {
    const software = await manager.addSa(outbound());
    const gone = await manager.addSa(outbound({ spi: 7, ...otherKey(0x60) }));
    await gone.remove();
    const inline = inlineSa(40);
    const wrongWay = (await manager.addSa(inbound({ spi: 8, ...otherKey(0x70) }))).handle;
    const choices = [0, software.handle, gone.handle, inline, wrongWay, 63, 64, 65, 0xffffffff];
    fc.assert(
      fc.property(fc.array(fc.constantFrom(...choices), { minLength: 1, maxLength: 400 }), (asked) => {
        ring.room = 512;
        const before = pool.available;
        const burst = packets(asked.length, (i) => asked[i]);
        expect(tx.burst(burst, asked.length)).toBe(asked.length);
        const may = [...burst].filter((_, i) => [0, software.handle, inline].includes(asked[i]));
        expect(ring.sent.map(({ packet }) => packet)).toEqual(may);
        for (const { packet, sa, frame: hex } of ring.sent) {
          const i = burst.indexOf(packet);
          const clear = hex.includes(hexOf(`number ${i}`));
          expect(clear).toBe(asked[i] !== software.handle);
          expect(sa).toBe(asked[i] === inline ? inline : 0);
        }
        ring.reclaim();
        expect(pool.available).toBe(before);
      }),
      { numRuns: 60 },
    );
  });
});

describe('the receive queue of a NIC', () => {
  /** Protects `n` packets as the peer does and lets them arrive. */
  async function arrive(n: number): Promise<Uint32Array> {
    const peer = await manager.addSa(outbound());
    const burst = packets(n, () => peer.handle);
    ring.room = n;
    expect(tx.burst(burst, n)).toBe(n);
    ring.sent.length = 0;
    await peer.remove();
    ring.arriving.push(...burst);
    return burst;
  }

  it('hands on what it gets when there is no inbound SA', async () => {
    const burst = await arrive(4);
    const out = new Uint32Array(8);
    expect(rx.burst(out, 8)).toBe(4);
    expect([...out.subarray(0, 4)]).toEqual([...burst]);
    expect(pool.sa[out[0]]).toBe(0);
  });

  it('opens what software has an SA for, in order with what it has not', async () => {
    const inn = await manager.addSa(inbound());
    const burst = await arrive(600);
    const [clear] = packets(1, () => 0);
    ring.arriving.splice(300, 0, clear);
    const out = new Uint32Array(1024);
    expect(rx.burst(out, 1024)).toBe(601);
    expect([...out.subarray(0, 601)]).toEqual([...burst.subarray(0, 300), clear, ...burst.subarray(300)]);
    expect(pool.sa[clear]).toBe(0);
    for (const p of burst) {
      expect(pool.sa[p]).toBe(inn.handle);
      expect(pool.flags[p]).toBe(PacketFlag.secured);
    }
    expect(inn.traffic().packets).toBe(600n);
  });

  it('offers to software what the device could not process, and takes the mark away when software can', async () => {
    const inn = await manager.addSa(inbound());
    const [p] = await arrive(1);
    pool.flags[p] = PacketFlag.securityError;
    const out = new Uint32Array(4);
    expect(rx.burst(out, 4)).toBe(1);
    expect([pool.sa[p], pool.flags[p]]).toEqual([inn.handle, PacketFlag.secured]);
  });

  it('leaves alone what the device has secured, and drops what software refuses', async () => {
    const inn = await manager.addSa(inbound());
    const burst = await arrive(3);
    pool.flags[burst[0]] = PacketFlag.secured;
    pool.sa[burst[0]] = 50;
    pool.u8[pool.offset[burst[1]] + pool.length[burst[1]] - 1] ^= 1;
    const free = pool.available;
    const out = new Uint32Array(4);
    expect(rx.burst(out, 4)).toBe(2);
    expect([...out.subarray(0, 2)]).toEqual([burst[0], burst[2]]);
    expect(pool.sa[burst[0]]).toBe(50);
    expect(rx.dropped[Verdict.icv]).toBe(1);
    expect(pool.available).toBe(free + 1);
    expect(inn.traffic().dropped).toEqual({ icv: 1 });
  });

  it('holds what the device has secured against the selector of its SA', () => {
    const { state } = manager;
    const selector = { destinationPort: 53 };
    state.add(50, inbound({ selector }), SaPlace.inlineInbound, 0, selector);
    state.add(51, inbound(), SaPlace.inlineInbound, 0, null);
    const burst = packets(3, (i) => (i === 2 ? 51 : 50));
    for (const p of burst) pool.flags[p] = PacketFlag.secured;
    pool.u8[pool.offset[burst[1]] + 14 + 20 + 3] = 54;
    ring.arriving.push(...burst);
    const out = new Uint32Array(4);
    expect(rx.burst(out, 4)).toBe(2);
    expect([...out.subarray(0, 2)]).toEqual([burst[0], burst[2]]);
    expect(rx.dropped[Verdict.selector]).toBe(1);
    expect(state.packets[50]).toBe(1);
    expect(state.dropped(50)).toEqual({ selector: 1 });
  });
});

describe('the memory of these tests', () => {
  it('is given back', () => {
    memory.u8[0] = 1;
    unmapMemory(memory);
    expect(memory.u8[0]).toBe(0);
  });
});
