import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { IpsecError } from '../../src/errors.ts';
import { RECORD, SaKind, SaTable, SaWord } from '../../src/fallback/sa-table.ts';
import { MAX_HANDLE, SaDatabase } from '../../src/fallback/sad.ts';
import { runs } from '../depth.ts';
import { type Bench, counting, ipv4, ipv6, makeBench, makeSa, protectOne, unprotectOne } from './support.ts';

const PACKET = ipv4(counting(40));

function codeOf(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    if (error instanceof IpsecError) return error.code;
    throw error;
  }
  return 'none';
}

/** A packet of an SA that only the sender has: its SPI and destination are what the receiver looks up. */
function sent(bench: Bench, spi: number, destination: string, changes: Parameters<typeof makeSa>[1] = {}): Uint8Array {
  const source = destination.includes(':') ? '2001:db8::1' : '192.0.2.1';
  const handle = MAX_HANDLE;
  bench.ipsec.add(handle, makeSa('outbound', { spi, tunnel: { source, destination }, ...changes }));
  const { bytes, verdict } = protectOne(bench, PACKET, handle);
  bench.ipsec.remove(handle);
  expect(verdict).toBe('ok');
  return bytes;
}

describe('inbound SAs with one SPI', () => {
  const SPI = 0x2000;

  it('are told apart by destination, of both families', () => {
    const bench = makeBench();
    const destinations = ['192.0.2.2', '192.0.2.3', '198.51.100.9', '2001:db8::2', '2001:db8::3'];
    destinations.forEach((destination, i) => {
      const source = destination.includes(':') ? '2001:db8::1' : '192.0.2.1';
      bench.ipsec.add(i + 1, makeSa('inbound', { spi: SPI, tunnel: { source, destination } }));
    });
    destinations.forEach((destination, i) => {
      expect(unprotectOne(bench, sent(bench, SPI, destination))).toMatchObject({ verdict: 'ok', sa: i + 1 });
    });
    expect(unprotectOne(bench, sent(bench, SPI, '192.0.2.4')).verdict).toBe('no-sa');
    expect(unprotectOne(bench, sent(bench, SPI, '2001:db8::4')).verdict).toBe('no-sa');
    expect(unprotectOne(bench, sent(bench, SPI + 1, '192.0.2.2')).verdict).toBe('no-sa');
  });

  it('are found by the longest prefix, whatever the order they came in', () => {
    const selectors = ['10.0.0.0/8', '10.1.0.0/16', '10.1.0.1', undefined];
    const orders = [
      [0, 1, 2, 3],
      [3, 2, 1, 0],
      [1, 3, 0, 2],
    ];
    for (const order of orders) {
      const bench = makeBench();
      for (const i of order) {
        const destination = selectors[i];
        const selector = destination === undefined ? {} : { selector: { destination } };
        bench.ipsec.add(i + 1, makeSa('inbound', { spi: SPI, mode: 'transport', replayWindow: 0, ...selector }));
      }
      const transport = makeSa('outbound', { spi: SPI, mode: 'transport' });
      const find = (destination: number[]): number => {
        bench.ipsec.add(100, transport);
        const { bytes } = protectOne(bench, ipv4(counting(30), { destination: Uint8Array.from(destination) }), 100);
        bench.ipsec.remove(100);
        return unprotectOne(bench, bytes).sa;
      };
      expect(find([10, 1, 0, 1])).toBe(3);
      expect(find([10, 1, 0, 2])).toBe(2);
      expect(find([10, 2, 0, 1])).toBe(1);
      expect(find([11, 1, 0, 1])).toBe(4);
      bench.ipsec.remove(3);
      bench.ipsec.remove(2);
      expect(find([10, 1, 0, 1])).toBe(1);
      bench.ipsec.remove(1);
      expect(find([10, 1, 0, 1])).toBe(4);
    }
  });

  it('are told apart by protocol', () => {
    const bench = makeBench();
    const auth = { name: 'hmac-sha256', key: counting(32) } as const;
    const ah = { spi: SPI, protocol: 'ah', auth } as const;
    bench.ipsec.add(1, makeSa('inbound', { spi: SPI }));
    bench.ipsec.add(2, makeSa('inbound', { ...ah, replayWindow: 0 }));
    expect(unprotectOne(bench, sent(bench, SPI, '192.0.2.2')).sa).toBe(1);
    expect(unprotectOne(bench, sent(bench, SPI, '192.0.2.2', ah)).sa).toBe(2);
    bench.ipsec.remove(1);
    expect(unprotectOne(bench, sent(bench, SPI, '192.0.2.2')).verdict).toBe('no-sa');
    expect(unprotectOne(bench, sent(bench, SPI, '192.0.2.2', ah)).verdict).toBe('ok');
  });

  it('and one destination and protocol are one too many', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('inbound', { spi: SPI }));
    expect(codeOf(() => bench.ipsec.add(2, makeSa('inbound', { spi: SPI })))).toBe('SA_EXISTS');
    expect(bench.engine.contexts).toBe(1);
    expect(unprotectOne(bench, sent(bench, SPI, '192.0.2.2'))).toMatchObject({ verdict: 'ok', sa: 1 });
    bench.ipsec.add(2, makeSa('outbound', { spi: SPI }));
  });

  it('let an IPv6 tunnel end and an IPv4 one be the same bits', () => {
    const bench = makeBench();
    const destination = 'c000:202::';
    bench.ipsec.add(1, makeSa('inbound', { spi: SPI, tunnel: { source: '2001:db8::1', destination } }));
    bench.ipsec.add(2, makeSa('inbound', { spi: SPI }));
    expect(unprotectOne(bench, sent(bench, SPI, destination)).sa).toBe(1);
    expect(unprotectOne(bench, sent(bench, SPI, '192.0.2.2')).sa).toBe(2);
  });
});

describe('handles', () => {
  it.each([0, -1, 1.5, Number.NaN, MAX_HANDLE + 1, 2 ** 32 + 1])('of %d are refused', (handle) => {
    expect(codeOf(() => makeBench().ipsec.add(handle, makeSa('outbound')))).toBe('BAD_HANDLE');
  });

  it('are taken until the SA is removed', () => {
    const bench = makeBench();
    bench.ipsec.add(MAX_HANDLE, makeSa('outbound'));
    expect(codeOf(() => bench.ipsec.add(MAX_HANDLE, makeSa('outbound')))).toBe('HANDLE_IN_USE');
    bench.ipsec.remove(MAX_HANDLE);
    expect(codeOf(() => bench.ipsec.remove(MAX_HANDLE))).toBe('NO_SUCH_SA');
    bench.ipsec.add(MAX_HANDLE, makeSa('outbound'));
  });

  it('of no SA are an error for whoever asks and a verdict for packets', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound'));
    bench.ipsec.add(2, makeSa('inbound'));
    for (const handle of [3, 255, 256, 100_000, MAX_HANDLE, 0xffffffff]) {
      expect(codeOf(() => bench.ipsec.counters(handle))).toBe('NO_SUCH_SA');
      expect(codeOf(() => bench.ipsec.modify(handle, makeSa('outbound')))).toBe('NO_SUCH_SA');
      expect(codeOf(() => bench.ipsec.setMtu(handle, 1500))).toBe('NO_SUCH_SA');
      expect(protectOne(bench, PACKET, handle)).toMatchObject({ verdict: 'no-sa' });
    }
    // An inbound SA protects nothing.
    expect(protectOne(bench, PACKET, 2).verdict).toBe('no-sa');
    expect(codeOf(() => bench.ipsec.setMtu(2, 1500))).toBe('SA_DIRECTION');
  });
});

describe('the hash table of inbound SAs', () => {
  /** SPIs that the hash takes to the numbers 0 to 15: they share their home at any size. The factor is the inverse of `GOLDEN`. */
  const close = Array.from({ length: 16 }, (_, i) => Math.imul(i, 0xe8b2f51));
  const spi = fc.oneof(
    fc.integer({ min: 1, max: 40 }),
    fc.integer({ min: -0x80000000, max: 0x7fffffff }),
    fc.constantFrom(...close),
  );

  it('finds what a plain map finds, after any additions and removals', () => {
    const step = fc.record({ spi, destination: fc.integer({ min: 0, max: 3 }) });
    fc.assert(
      fc.property(fc.array(step, { maxLength: 300 }), (steps) => {
        const table = new SaTable();
        const sad = new SaDatabase(table);
        const model = new Map<string, number>();
        const lookup = (one: number, destination: number): number =>
          sad.lookup(one, SaKind.esp, new Uint16Array(Uint8Array.from(packetTo(destination)).buffer), 0, 4);
        for (const one of steps) {
          const name = `${one.spi} ${one.destination}`;
          const known = model.get(name);
          if (known !== undefined) {
            sad.remove(known);
            table.release(known);
            model.delete(name);
          } else {
            const slot = table.allocate();
            writeInbound(table, slot, one.spi, one.destination);
            sad.insert(slot);
            model.set(name, slot);
          }
          expect(lookup(one.spi, one.destination)).toBe(model.get(name) ?? model.get(`${one.spi} 0`) ?? 0);
        }
        for (const one of steps) {
          const expected = model.get(`${one.spi} ${one.destination}`) ?? model.get(`${one.spi} 0`) ?? 0;
          expect(lookup(one.spi, one.destination)).toBe(expected);
        }
      }),
      { numRuns: runs(100) },
    );
  });

  it('holds 70000, loses half of them and finds the rest', () => {
    const table = new SaTable();
    const sad = new SaDatabase(table);
    const u16 = new Uint16Array(Uint8Array.from(packetTo(1)).buffer);
    const slots: number[] = [];
    for (let i = 0; i < 70_000; i++) {
      const slot = table.allocate();
      writeInbound(table, slot, Math.imul(i, 0x10001) | 0, 1);
      sad.insert(slot);
      slots.push(slot);
    }
    for (let i = 0; i < 70_000; i += 2) sad.remove(slots[i]);
    const wrong: number[] = [];
    for (let i = 0; i < 70_000; i++) {
      const found = sad.lookup(Math.imul(i, 0x10001) | 0, SaKind.esp, u16, 0, 4);
      if (found !== (i % 2 === 0 ? 0 : slots[i])) wrong.push(i);
    }
    expect(wrong).toEqual([]);
    expect(sad.hash.length).toBeLessThanOrEqual(2 * 4 * 65536);
  });
});

describe('65536 SAs', () => {
  it('come and go while traffic runs, each with its own numbers and counters', () => {
    const bench = makeBench();
    const COUNT = 65_536;
    const first = makeSa('outbound', { spi: 1 << 20 });
    const second = makeSa('inbound', { spi: 1 << 20 });
    for (let i = 1; i <= COUNT; i++) bench.ipsec.add(i, { ...first, spi: first.spi + i });
    for (let i = 1; i <= COUNT; i++) bench.ipsec.add(COUNT + i, { ...second, spi: second.spi + i });
    for (let round = 1; round <= 3; round++) {
      for (const i of [1, 2, 63, 64, 65, 1000, 32_768, 65_535, COUNT]) {
        const opened = unprotectOne(bench, protectOne(bench, PACKET, i).bytes);
        expect(opened).toMatchObject({ verdict: 'ok', sa: COUNT + i });
        expect(bench.ipsec.counters(i)).toMatchObject({ packets: BigInt(round), sequence: BigInt(round + 1) });
        expect(bench.ipsec.counters(COUNT + i)).toMatchObject({ packets: BigInt(round), sequence: BigInt(round) });
      }
      for (let i = 2000 * round; i < 2000 * round + 1000; i++) {
        bench.ipsec.remove(i);
        bench.ipsec.remove(COUNT + i);
        expect(protectOne(bench, PACKET, i).verdict).toBe('no-sa');
      }
      bench.ipsec.add(2000 * round, { ...first, spi: first.spi + 2000 * round });
      bench.ipsec.add(COUNT + 2000 * round, { ...second, spi: second.spi + 2000 * round });
      const again = unprotectOne(bench, protectOne(bench, PACKET, 2000 * round).bytes);
      expect(again).toMatchObject({ verdict: 'ok', sa: COUNT + 2000 * round });
      // A slot that is used again begins at zero.
      expect(bench.ipsec.counters(2000 * round)).toMatchObject({ packets: 1n, bytes: 60n, dropped: {} });
    }
    bench.ipsec.close();
    expect(bench.engine.contexts).toBe(0);
  }, 60_000);
});

/** An IPv4 header to 192.0.2.`last`. */
function packetTo(last: number): Uint8Array {
  return ipv4(new Uint8Array(4), { destination: Uint8Array.from([192, 0, 2, last]) });
}

/** What the database reads of a record; destination 0 is any. */
function writeInbound(table: SaTable, slot: number, spi: number, destination: number): void {
  const record = slot * RECORD;
  table.words[record + SaWord.kind] = SaKind.inbound | SaKind.esp;
  table.words[record + SaWord.spi] = spi;
  if (destination === 0) return;
  const [word] = new Int32Array(Uint8Array.from([192, 0, 2, destination]).buffer);
  table.words[record + SaWord.destination] = word;
  table.words[record + SaWord.mask] = -1;
  table.words[record + SaWord.destinationBits] = (4 << 8) | 32;
}

describe('an inbound SA', () => {
  it('that has gone is not found, and a new one in its slot has its own window', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound'));
    bench.ipsec.add(2, makeSa('inbound', { replayWindow: 1024 }));
    const bytes = protectOne(bench, PACKET, 1).bytes;
    expect(unprotectOne(bench, bytes).verdict).toBe('ok');
    expect(unprotectOne(bench, bytes).verdict).toBe('replay');
    bench.ipsec.remove(2);
    expect(unprotectOne(bench, bytes).verdict).toBe('no-sa');
    bench.ipsec.add(3, makeSa('inbound', { replayWindow: 1024 }));
    expect(unprotectOne(bench, bytes)).toMatchObject({ verdict: 'ok', sa: 3 });
    expect(unprotectOne(bench, bytes).verdict).toBe('replay');
    expect(unprotectOne(bench, ipv6(counting(40))).verdict).toBe('not-ipsec');
  });
});
