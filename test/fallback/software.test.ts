import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { IpsecError } from '../../src/errors.ts';
import { EngineError, type EngineName } from '../../src/fallback/engines/engine.ts';
import { SoftwareIpsec } from '../../src/fallback/software.ts';
import { verdictNames } from '../../src/fallback/verdict.ts';
import { PacketPool } from '../../src/packet/pool.ts';
import { mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';
import {
  type Bench,
  concat,
  counting,
  espTransforms,
  ethernet,
  ipv4,
  ipv6,
  makeBench,
  makePair,
  makeSa,
  pass,
  protectOne,
  toHex,
  unprotectOne,
  V6,
} from './support.ts';

const PACKET = ipv4(counting(80));
const AEAD = { name: 'aes-gcm', salt: counting(4), icvLength: 16 } as const;
const OTHER_KEY = { ...AEAD, key: counting(16, 99) };
const CBC = {
  cipher: { name: 'aes-cbc', key: counting(16) },
  auth: { name: 'hmac-sha256', key: counting(32) },
} as const;

function codeOf(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    if (error instanceof IpsecError) return error.code;
    throw error;
  }
  return 'none';
}

/** Sequence number and explicit IV of an ESP packet in an IPv4 tunnel. */
function sequenceAndIv(bytes: Uint8Array, ivLength = 8): [number, string] {
  return [new DataView(bytes.buffer).getUint32(24), toHex(bytes.subarray(28, 28 + ivLength))];
}

describe('a modified SA', () => {
  it('goes on with its sequence number, IV and counters under the same key', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound', { initial: { sequence: 7, iv: counting(8, 200) } }));
    const [, iv] = sequenceAndIv(protectOne(bench, PACKET, 1).bytes);
    bench.ipsec.modify(1, makeSa('outbound', { spi: 0x7777, initial: { sequence: 1 } }));
    const { bytes } = protectOne(bench, PACKET, 1);
    const [sequence, next] = sequenceAndIv(bytes);
    expect(toHex(bytes.subarray(20, 24))).toBe('00007777');
    expect(sequence).toBe(8);
    expect(BigInt(`0x${next}`)).toBe(BigInt(`0x${iv}`) + 1n);
    expect(bench.ipsec.counters(1)).toMatchObject({ packets: 2n, bytes: 200n, sequence: 9n });
  });

  it('keeps its replay window under the same key, whatever its new size', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound'));
    bench.ipsec.add(2, makeSa('inbound', { replayWindow: 64 }));
    const sent = Array.from({ length: 40 }, () => protectOne(bench, PACKET, 1).bytes);
    const verdicts = (which: number[]): string[] => which.map((i) => unprotectOne(bench, sent[i]).verdict);
    expect(verdicts([0, 5, 20])).toEqual(['ok', 'ok', 'ok']);
    bench.ipsec.modify(2, makeSa('inbound', { replayWindow: 1024 }));
    expect(verdicts([0, 5, 20, 6])).toEqual(['replay', 'replay', 'replay', 'ok']);
    bench.ipsec.modify(2, makeSa('inbound', { replayWindow: 32 }));
    expect(verdicts([6, 20, 21, 7])).toEqual(['replay', 'replay', 'ok', 'ok']);
    expect(bench.ipsec.counters(2)).toMatchObject({ packets: 6n, dropped: { replay: 5 } });
  });

  it('with a new key starts its numbers and its lifetime anew; the counters go on', () => {
    const bench = makeBench();
    const lifetime = { hardPackets: 3 };
    const [outbound, inbound] = makePair({ lifetime });
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    for (let i = 0; i < 3; i++) expect(unprotectOne(bench, protectOne(bench, PACKET, 1).bytes).verdict).toBe('ok');
    expect(protectOne(bench, PACKET, 1).verdict).toBe('expired');
    const [newOut, newIn] = makePair({ lifetime, aead: OTHER_KEY });
    bench.ipsec.modify(1, newOut);
    bench.ipsec.modify(2, newIn);
    for (let i = 1; i <= 3; i++) {
      const { bytes } = protectOne(bench, PACKET, 1);
      expect(sequenceAndIv(bytes)[0]).toBe(i);
      expect(unprotectOne(bench, bytes).verdict).toBe('ok');
    }
    expect(protectOne(bench, PACKET, 1).verdict).toBe('expired');
    expect(bench.ipsec.counters(1)).toMatchObject({ packets: 6n, bytes: 600n, dropped: { expired: 2 } });
    expect(bench.events).toEqual([
      [1, 'hard-packets'],
      [1, 'hard-packets'],
    ]);
  });

  it('under the same key counts the packets it had against a new limit', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound'));
    pass(bench, Array(5).fill(PACKET), 1);
    bench.ipsec.modify(1, makeSa('outbound', { lifetime: { hardPackets: 6 } }));
    const verdicts = pass(bench, Array(3).fill(PACKET), 1).map(({ verdict }) => verdict);
    expect(verdicts).toEqual(['ok', 'expired', 'expired']);
  });

  it('does not come back to a key that it has sent with', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound'));
    bench.ipsec.add(2, makeSa('inbound'));
    bench.ipsec.modify(1, makeSa('outbound', { aead: OTHER_KEY }));
    expect(codeOf(() => bench.ipsec.modify(1, makeSa('outbound')))).toBe('NONCE_REUSE');
    // In another mode it would be the same key stream.
    const ctr = { cipher: { name: 'aes-ctr', key: counting(16), salt: counting(4) }, auth: CBC.auth } as const;
    expect(codeOf(() => bench.ipsec.modify(1, makeSa('outbound', ctr)))).toBe('NONCE_REUSE');
    const before = protectOne(bench, PACKET, 1);
    expect(sequenceAndIv(before.bytes)[0]).toBe(1);
    // Who receives makes no nonces.
    bench.ipsec.modify(2, makeSa('inbound', { aead: OTHER_KEY }));
    expect(unprotectOne(bench, before.bytes).verdict).toBe('ok');
    bench.ipsec.modify(2, makeSa('inbound'));
    expect(unprotectOne(bench, before.bytes).verdict).toBe('icv');
  });

  it('knows that counter blocks of CCM are those of GCM with another salt', () => {
    const bench = makeBench();
    const [key, salt] = [counting(16), Uint8Array.of(3, 7, 8, 9)];
    bench.ipsec.add(1, makeSa('outbound', { aead: { name: 'aes-gcm', key, salt, icvLength: 16 } }));
    const first = sequenceAndIv(protectOne(bench, PACKET, 1).bytes);
    bench.ipsec.modify(
      1,
      makeSa('outbound', { aead: { name: 'aes-ccm', key, salt: salt.subarray(1), icvLength: 16 } }),
    );
    const second = sequenceAndIv(protectOne(bench, PACKET, 1).bytes);
    expect([first[0], second[0]]).toEqual([1, 2]);
    expect(second[1]).not.toBe(first[1]);
  });

  it.each([
    ['a new cipher key', { cipher: { name: 'aes-cbc', key: counting(16, 77) }, auth: CBC.auth }],
    ['another cipher', { cipher: { name: 'aes-ctr', key: counting(32), salt: counting(4) }, auth: CBC.auth }],
    ['no cipher', { cipher: { name: 'null' }, auth: CBC.auth }],
  ] as const)(
    'with %s and the same authenticator goes on with numbers and window: old packets would pass the ICV',
    (_, next) => {
      const bench = makeBench();
      bench.ipsec.add(1, makeSa('outbound', CBC));
      bench.ipsec.add(2, makeSa('inbound', CBC));
      const old = Array.from({ length: 6 }, () => protectOne(bench, PACKET, 1).bytes);
      for (const bytes of old.slice(0, 5)) expect(unprotectOne(bench, bytes).verdict).toBe('ok');
      bench.ipsec.modify(1, makeSa('outbound', next));
      bench.ipsec.modify(2, makeSa('inbound', next));
      for (const bytes of old.slice(0, 5)) expect(unprotectOne(bench, bytes).verdict).toBe('replay');
      const { bytes } = protectOne(bench, PACKET, 1);
      expect(sequenceAndIv(bytes)[0]).toBe(7);
      expect(unprotectOne(bench, bytes)).toMatchObject({ verdict: 'ok', sa: 2 });
    },
  );

  it('with a new salt of AES-CTR and the same authenticator accepts no old packet', () => {
    const bench = makeBench();
    const ctr = (first: number) =>
      ({ cipher: { name: 'aes-ctr', key: counting(16), salt: counting(4, first) }, auth: CBC.auth }) as const;
    bench.ipsec.add(1, makeSa('outbound', ctr(1)));
    bench.ipsec.add(2, makeSa('inbound', ctr(1)));
    const { bytes } = protectOne(bench, PACKET, 1);
    expect(unprotectOne(bench, bytes).verdict).toBe('ok');
    bench.ipsec.modify(2, makeSa('inbound', ctr(50)));
    expect(unprotectOne(bench, bytes).verdict).toBe('replay');
  });

  it('with a new authenticator begins a window, and repeats no nonce of the cipher', () => {
    const bench = makeBench();
    const ctr = (first: number) =>
      ({
        cipher: { name: 'aes-ctr', key: counting(16), salt: counting(4) },
        auth: { name: 'hmac-sha256', key: counting(32, first) },
      }) as const;
    bench.ipsec.add(1, makeSa('outbound', ctr(1)));
    bench.ipsec.add(2, makeSa('inbound', ctr(1)));
    for (let i = 0; i < 3; i++) expect(unprotectOne(bench, protectOne(bench, PACKET, 1).bytes).verdict).toBe('ok');
    bench.ipsec.modify(1, makeSa('outbound', ctr(2)));
    bench.ipsec.modify(2, makeSa('inbound', ctr(2)));
    expect(bench.ipsec.counters(2).sequence).toBe(0n);
    const { bytes } = protectOne(bench, PACKET, 1);
    expect(sequenceAndIv(bytes)).toEqual([4, '0000000000000004']);
    expect(unprotectOne(bench, bytes).verdict).toBe('ok');
  });

  it('with a new cipher key and the same authenticator has its sequence numbers for IVs, whatever is said of IVs', () => {
    const bench = makeBench();
    const ctr = (first: number, name: 'aes-xcbc' | 'aes-cmac' = 'aes-xcbc') =>
      ({
        cipher: { name: 'aes-ctr', key: counting(16, first), salt: counting(4) },
        auth: { name, key: counting(16) },
        initial: { sequence: 9, iv: counting(8, first) },
      }) as const;
    bench.ipsec.add(1, makeSa('outbound', ctr(1)));
    expect(sequenceAndIv(protectOne(bench, PACKET, 1).bytes)).toEqual([9, toHex(counting(8, 1))]);
    bench.ipsec.modify(1, makeSa('outbound', ctr(2)));
    expect(sequenceAndIv(protectOne(bench, PACKET, 1).bytes)).toEqual([10, '000000000000000a']);
    // Another authenticator with the same key is another one: numbers and IVs begin as the SA says.
    bench.ipsec.modify(1, makeSa('outbound', ctr(3, 'aes-cmac')));
    expect(sequenceAndIv(protectOne(bench, PACKET, 1).bytes)).toEqual([9, toHex(counting(8, 3))]);
  });

  it('that comes back to a key accepts no packet of before', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound'));
    bench.ipsec.add(2, makeSa('inbound'));
    const old = Array.from({ length: 4 }, () => protectOne(bench, PACKET, 1).bytes);
    for (const bytes of [old[0], old[2]]) expect(unprotectOne(bench, bytes).verdict).toBe('ok');
    bench.ipsec.modify(2, makeSa('inbound', { aead: OTHER_KEY }));
    expect(bench.ipsec.counters(2).sequence).toBe(0n);
    bench.ipsec.modify(2, makeSa('inbound'));
    expect(bench.ipsec.counters(2).sequence).toBe(3n);
    const verdicts = old.map((bytes) => unprotectOne(bench, bytes).verdict);
    expect(verdicts).toEqual(['replay', 'replay', 'replay', 'ok']);
  });

  it('stays as it was when the new parameters are refused', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound'));
    bench.ipsec.add(2, makeSa('inbound'));
    bench.ipsec.add(3, makeSa('inbound', { spi: 0x2002 }));
    expect(codeOf(() => bench.ipsec.modify(2, makeSa('outbound')))).toBe('SA_DIRECTION');
    expect(codeOf(() => bench.ipsec.modify(2, makeSa('inbound', { spi: 0x2002, aead: OTHER_KEY })))).toBe('SA_EXISTS');
    bench.engine.supports = (): boolean => false;
    expect(codeOf(() => bench.ipsec.modify(1, makeSa('outbound', { aead: OTHER_KEY })))).toBe('TRANSFORM_UNSUPPORTED');
    expect(bench.engine.contexts).toBe(3);
    const opened = unprotectOne(bench, protectOne(bench, PACKET, 1).bytes);
    expect(opened).toMatchObject({ verdict: 'ok', sa: 2 });
    expect(toHex(opened.bytes)).toBe(toHex(PACKET));
  });

  it('may change everything but its direction, and keeps its MTU', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound'));
    bench.ipsec.add(2, makeSa('inbound'));
    bench.ipsec.setMtu(1, 300);
    const changes = { spi: 0x9999, tunnel: V6, ...CBC, options: { esn: true }, udpEncap: {} };
    const [outbound, inbound] = makePair(changes);
    bench.ipsec.modify(1, outbound);
    bench.ipsec.modify(2, inbound);
    const { bytes } = protectOne(bench, PACKET, 1);
    expect(bytes[0] >>> 4).toBe(6);
    expect(toHex(unprotectOne(bench, bytes).bytes)).toBe(toHex(PACKET));
    expect(protectOne(bench, ipv4(counting(300)), 1).verdict).toBe('too-big');
    bench.ipsec.setMtu(1, 0);
    expect(protectOne(bench, ipv4(counting(300)), 1).verdict).toBe('ok');
    // The UDP port is that of the SA no more.
    expect(bench.ipsec.counters(2)).toMatchObject({ packets: 1n, transform: 'aes-128-cbc+hmac-sha256-16' });
  });
});

describe('initialisation vectors', () => {
  const counters = [...espTransforms()].filter(([id]) => !/cbc|null/.test(id));

  it.each(counters)('of %s count up from the initial one and never repeat', (_id, algorithms) => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound', { ...algorithms, initial: { iv: counting(8, 0xf0), sequence: 1 } }));
    bench.ipsec.add(2, makeSa('outbound', { ...algorithms, options: { esn: true }, initial: { sequence: 2n ** 32n } }));
    const given = BigInt(`0x${toHex(counting(8, 0xf0))}`);
    for (let i = 0n; i < 5n; i++) {
      const [, iv] = sequenceAndIv(protectOne(bench, PACKET, 1).bytes);
      expect(BigInt(`0x${iv}`)).toBe((given + i) % 2n ** 64n);
      expect(BigInt(`0x${sequenceAndIv(protectOne(bench, PACKET, 2).bytes)[1]}`)).toBe(2n ** 32n + i);
    }
  });

  it.each([
    ['aes-cbc', 16, CBC],
    ['3des-cbc', 8, { ...CBC, cipher: { name: '3des-cbc', key: counting(24, 11) } }],
  ] as const)('of %s are the given one first, and then fresh and unlike each other', (_name, length, algorithms) => {
    const bench = makeBench();
    const iv = counting(length, 77);
    bench.ipsec.add(1, makeSa('outbound', { ...algorithms, initial: { iv } }));
    const seen = new Set<string>();
    const bits = new Array<number>(8 * length).fill(0);
    for (let burst = 0; burst < 40; burst++) {
      const outcomes = pass(bench, Array(32).fill(PACKET), 1);
      for (const { bytes } of outcomes) {
        const [sequence, text] = sequenceAndIv(bytes, length);
        if (sequence === 1) expect(text).toBe(toHex(iv));
        seen.add(text);
        for (let bit = 0; bit < bits.length; bit++) bits[bit] += (bytes[28 + (bit >>> 3)] >>> (bit & 7)) & 1;
      }
    }
    expect(seen.size).toBe(40 * 32);
    // 1280 throws of a coin: 8 standard deviations are 143.
    for (const ones of bits) expect(Math.abs(ones - 640)).toBeLessThan(143);
  });
});

describe('a burst of many SAs', () => {
  it('becomes one engine call per transform, and the packets of an SA keep their order', () => {
    const bench = makeBench();
    const kinds = [{}, { aead: { ...AEAD, key: counting(32) } }, CBC, { tunnel: V6 }];
    for (let i = 0; i < 16; i++) bench.ipsec.add(1 + i, makeSa('outbound', { ...kinds[i % 4], spi: 0x3000 + i }));
    for (let i = 0; i < 16; i++) bench.ipsec.add(101 + i, makeSa('inbound', { ...kinds[i % 4], spi: 0x3000 + i }));
    const { pool } = bench;
    fc.assert(
      fc.property(fc.array(fc.integer({ min: 1, max: 16 }), { minLength: 1, maxLength: 64 }), (handles) => {
        const n = handles.length;
        const packets = new Uint32Array(n);
        const verdicts = new Uint8Array(n);
        pool.allocate(packets, n);
        handles.forEach((handle, i) => {
          pool.write(packets[i], ipv4(counting(i, i)));
          pool.sa[packets[i]] = handle;
        });
        const next = handles.map((handle, i) => {
          const earlier = handles.slice(0, i).filter((other) => other === handle).length;
          return Number(bench.ipsec.counters(handle).sequence) + earlier;
        });
        bench.engine.calls.length = 0;
        bench.ipsec.protect(packets, n, 0, verdicts);
        expect(verdicts.every((verdict) => verdict === 0)).toBe(true);
        const bursts = Math.ceil(n / 64);
        const transforms = new Set(handles.map((handle) => ['g', 'h', 'c', 'g'][(handle - 1) % 4]));
        expect(bench.engine.calls.length).toBeLessThanOrEqual(transforms.size * bursts);
        expect(bench.engine.calls.reduce((sum, { count }) => sum + count, 0)).toBe(n);
        handles.forEach((handle, i) => {
          const bytes = pool.read(packets[i]);
          const at = bytes[0] >>> 4 === 6 ? 44 : 24;
          expect(new DataView(bytes.buffer).getUint32(at)).toBe(next[i]);
          expect(pool.sa[packets[i]]).toBe(handle);
        });
        bench.engine.calls.length = 0;
        bench.ipsec.unprotect(packets, n, 0, verdicts);
        expect(verdicts.every((verdict) => verdict === 0)).toBe(true);
        // The leading packets of one transform go first, the rest are sorted.
        expect(bench.engine.calls.length).toBeLessThanOrEqual((transforms.size + 1) * bursts);
        handles.forEach((handle, i) => {
          expect(toHex(pool.read(packets[i]))).toBe(toHex(ipv4(counting(i, i))));
          expect(pool.sa[packets[i]]).toBe(100 + handle);
        });
        pool.free(packets, n);
      }),
      { numRuns: 60 },
    );
  });

  it('may hold plain packets, unknown handles and bad packets: each gets its own verdict', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound'));
    bench.ipsec.add(2, makeSa('inbound'));
    const { pool } = bench;
    const inputs = [PACKET, PACKET, PACKET, counting(3), PACKET, new Uint8Array(0), PACKET];
    const handles = [1, 0, 77, 1, 1, 1, 2];
    const packets = new Uint32Array(7);
    const verdicts = new Uint8Array(7);
    pool.allocate(packets, 7);
    inputs.forEach((input, i) => {
      pool.write(packets[i], input);
      pool.sa[packets[i]] = handles[i];
    });
    bench.ipsec.protect(packets, 7, 0, verdicts);
    const expected = ['ok', 'not-ipsec', 'no-sa', 'malformed', 'ok', 'malformed', 'no-sa'];
    expect([...verdicts].map((verdict) => verdictNames[verdict])).toEqual(expected);
    expect(toHex(pool.read(packets[1]))).toBe(toHex(PACKET));
    expect(sequenceAndIv(pool.read(packets[4]))[0]).toBe(2);
    expect(bench.ipsec.counters(1)).toMatchObject({ packets: 2n, dropped: { malformed: 2 } });
  });

  it('of nothing is nothing, and one longer than its arrays is an error', () => {
    const { ipsec } = makeBench();
    ipsec.protect(new Uint32Array(0), 0, 0, new Uint8Array(0));
    ipsec.unprotect(new Uint32Array(0), 0, 0, new Uint8Array(0));
    expect(() => ipsec.protect(new Uint32Array(2), 3, 0, new Uint8Array(3))).toThrow(RangeError);
    expect(() => ipsec.unprotect(new Uint32Array(3), 3, 0, new Uint8Array(2))).toThrow(RangeError);
    expect(() => ipsec.unprotect(new Uint32Array(3), 3, 13, new Uint8Array(3))).toThrow(RangeError);
  });
});

describe('the loops for the simple case', () => {
  /** A link header of 16 bytes takes the general way. */
  const general = (packet: Uint8Array): Uint8Array => concat(counting(2), ethernet(packet));
  const variants = [
    { name: 'AES-GCM' },
    { name: 'AES-GCM with ICV 8 and ESN', aead: { ...OTHER_KEY, icvLength: 8 }, options: { esn: true } },
    { name: 'AES-GCM with ESN at 2^32', options: { esn: true }, initial: { sequence: 2n ** 32n - 2n } },
    { name: 'AES-GCM with an IV', initial: { iv: counting(8, 250) } },
    { name: 'DSCP and DF copied', options: { copyDscp: true, copyDf: true } },
    { name: 'ChaCha20', aead: { name: 'chacha20-poly1305', key: counting(32), salt: counting(4) } },
    { name: 'AES-GMAC', aead: { ...OTHER_KEY, name: 'aes-gmac' } },
    { name: 'in UDP', udpEncap: {} },
    { name: 'IPv6 outside', tunnel: V6 },
    { name: 'transport mode', mode: 'transport' },
    { name: 'TTL decremented', options: { decrementTtl: true } },
  ] as const;

  it.each(variants)('do what the general way does: $name', ({ name: _, ...changes }) => {
    const simple = makeBench();
    const other = makeBench();
    const { initial } = changes as { initial?: { sequence?: bigint } };
    const sequence = (initial?.sequence ?? 1n) - 1n;
    for (const bench of [simple, other]) {
      const [outbound, inbound] = makePair(changes as never, { initial: { sequence } });
      bench.ipsec.add(1, outbound);
      bench.ipsec.add(2, inbound);
    }
    const packet = fc
      .tuple(fc.integer({ min: 0, max: 300 }), fc.nat(255), fc.constantFrom(0, 0x40), fc.boolean())
      .map(([size, tos, flags, six]) =>
        six ? ipv6(counting(size), { trafficClass: tos }) : ipv4(counting(size), { tos, flags: flags << 8 }),
      );
    fc.assert(
      fc.property(fc.array(packet, { minLength: 1, maxLength: 20 }), fc.boolean(), (packets, ether) => {
        const link = ether ? 14 : 0;
        const inputs = ether ? packets.map(ethernet) : packets;
        const out = pass(simple, inputs, 1, link);
        const reference = pass(other, packets.map(general), 1, 16);
        const text = (outcomes: typeof out, skip: number): string[] =>
          outcomes.map(({ verdict, bytes }) => `${verdict} ${toHex(bytes.subarray(skip))}`);
        expect(text(out, link)).toEqual(text(reference, 16));
        const opened = pass(
          simple,
          out.map(({ bytes }) => bytes),
          null,
          link,
        );
        const openedThere = pass(
          other,
          reference.map(({ bytes }) => bytes),
          null,
          16,
        );
        expect(text(opened, link)).toEqual(text(openedThere, 16));
        expect(opened.map(({ verdict }) => verdict)).toEqual(Array(packets.length).fill('ok'));
      }),
      { numRuns: 30 },
    );
    expect(simple.ipsec.counters(1)).toEqual(other.ipsec.counters(1));
    expect(simple.ipsec.counters(2)).toEqual(other.ipsec.counters(2));
  });
});

describe('where packets are in their slots', () => {
  /** Puts the packet `at` bytes into the slot, runs it, and says what became of it and whether anything else changed. */
  function runAt(
    bench: Bench,
    input: Uint8Array,
    at: number,
    handle: number | null,
  ): { verdict: string; bytes: Uint8Array } {
    const { pool } = bench;
    const packets = new Uint32Array(1);
    pool.allocate(packets, 1);
    const [p] = packets;
    const start = p * pool.stride;
    const end = start + pool.stride;
    const outside = concat(pool.u8.slice(0, start), pool.u8.slice(end));
    pool.offset[p] = start + at;
    pool.length[p] = input.length;
    pool.u8.set(input, start + at);
    if (handle !== null) pool.sa[p] = handle;
    const verdicts = new Uint8Array(1);
    if (handle === null) bench.ipsec.unprotect(packets, 1, 0, verdicts);
    else bench.ipsec.protect(packets, 1, 0, verdicts);
    expect(Buffer.compare(outside, concat(pool.u8.slice(0, start), pool.u8.slice(end)))).toBe(0);
    const bytes = pool.read(p);
    pool.free(packets, 1);
    return { verdict: verdictNames[verdicts[0]], bytes };
  }

  const kinds = {
    simple: {},
    CBC,
    'IPv6 in UDP': { tunnel: V6, udpEncap: {} },
    transport: { mode: 'transport' },
  } as const;

  it.each(Object.entries(kinds))(
    'does not matter where there is room, and no byte outside changes: %s',
    (_, changes) => {
      const bench = makeBench(512, 4);
      const [outbound, inbound] = makePair(changes);
      bench.ipsec.add(1, outbound);
      bench.ipsec.add(2, inbound);
      const seen = new Set<string>();
      for (let at = 0; at <= 512 - PACKET.length; at++) {
        const out = runAt(bench, PACKET, at, 1);
        seen.add(out.verdict);
        if (out.verdict !== 'ok') {
          expect(out.verdict).toBe('no-room');
          continue;
        }
        // Wherever the peer has it: in the middle there is always room.
        const opened = runAt(bench, out.bytes, 128 + (at & 3), null);
        expect(opened.verdict).toBe('ok');
        expect(toHex(opened.bytes)).toBe(toHex(PACKET));
      }
      expect([...seen].sort()).toEqual(['no-room', 'ok']);
    },
  );

  it('is refused for chains', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound'));
    bench.ipsec.add(2, makeSa('inbound'));
    const { bytes } = protectOne(bench, PACKET, 1);
    const { pool } = bench;
    const packets = new Uint32Array(2);
    pool.allocate(packets, 2);
    pool.write(packets[0], PACKET);
    pool.sa[packets[0]] = 1;
    pool.next[packets[0]] = packets[1];
    const verdicts = new Uint8Array(1);
    bench.ipsec.protect(packets, 1, 0, verdicts);
    expect(verdictNames[verdicts[0]]).toBe('no-room');
    pool.write(packets[0], bytes);
    pool.next[packets[0]] = packets[1];
    bench.ipsec.unprotect(packets, 1, 0, verdicts);
    expect(verdictNames[verdicts[0]]).toBe('no-room');
  });
});

describe('dummy packets and TFC padding', () => {
  it.each(['tunnel', 'transport'] as const)('dummies in %s mode reach the peer and are thrown away there', (mode) => {
    const bench = makeBench();
    const [outbound, inbound] = makePair({ mode });
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const { pool, ipsec } = bench;
    const packets = new Uint32Array(3);
    const verdicts = new Uint8Array(3);
    pool.allocate(packets, 3);
    for (const p of packets) {
      pool.write(p, PACKET);
      pool.sa[p] = 1;
    }
    ipsec.protectDummies(packets, 3, 0, verdicts);
    expect([...verdicts]).toEqual([0, 0, 0]);
    ipsec.unprotect(packets, 3, 0, verdicts);
    expect([...verdicts].map((verdict) => verdictNames[verdict])).toEqual(['dummy', 'dummy', 'dummy']);
    // Their numbers are used up on both sides.
    const { bytes } = protectOne(bench, PACKET, 1);
    expect(sequenceAndIv(bytes)[0]).toBe(4);
    expect(unprotectOne(bench, bytes).verdict).toBe('ok');
  });

  it.each([1, 2, 3, 4, 100, 1000])(
    '%i bytes of TFC padding make the packet that much longer and are cut off',
    (tfc) => {
      const bench = makeBench();
      bench.ipsec.add(1, makeSa('outbound', { tfcPadding: tfc }));
      bench.ipsec.add(2, makeSa('inbound'));
      bench.ipsec.add(3, makeSa('outbound', { spi: 0x9 }));
      for (const packet of [PACKET, ipv6(counting(33))]) {
        const { bytes } = protectOne(bench, packet, 1);
        const plain = protectOne(bench, packet, 3).bytes.length;
        expect(bytes.length - plain).toBeGreaterThanOrEqual(tfc - 3);
        expect(bytes.length - plain).toBeLessThanOrEqual(tfc + 3);
        expect(toHex(unprotectOne(bench, bytes).bytes)).toBe(toHex(packet));
      }
    },
  );
});

describe('an engine that fails', () => {
  it.each([{}, { tunnel: V6 }, CBC])('leaves nothing that could be sent or delivered in the clear: %o', (changes) => {
    const bench = makeBench();
    const [outbound, inbound] = makePair(changes);
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const { bytes } = protectOne(bench, PACKET, 1);
    bench.engine.broken = true;
    expect(protectOne(bench, PACKET, 1)).toMatchObject({ verdict: 'engine', bytes: new Uint8Array(0) });
    expect(unprotectOne(bench, bytes).verdict).toBe('engine');
    bench.engine.broken = false;
    expect(bench.ipsec.counters(1).dropped).toEqual({ engine: 1 });
    expect(bench.ipsec.counters(2).dropped).toEqual({ engine: 1 });
    // The window did not move, and the number of the failed packet is not used twice.
    expect(unprotectOne(bench, bytes).verdict).toBe('ok');
    expect(sequenceAndIv(protectOne(bench, PACKET, 1).bytes)[0]).toBeGreaterThan(2);
  });
});

describe('events', () => {
  it('may add, modify and remove SAs', () => {
    const bench = makeBench();
    const { pool, engine } = bench;
    const told: string[] = [];
    const ipsec = new SoftwareIpsec(pool, {
      engine: [engine],
      onEvent: (handle, event) => {
        told.push(`${handle} ${event}`);
        if (event === 'soft-packets') ipsec.modify(1, makeSa('outbound', { aead: OTHER_KEY }));
        else ipsec.remove(handle);
      },
    });
    ipsec.add(1, makeSa('outbound', { lifetime: { softPackets: 2 } }));
    ipsec.add(2, makeSa('outbound', { lifetime: { hardPackets: 1 } }));
    const mine = { ...bench, ipsec };
    const outcomes = pass(mine, Array(4).fill(PACKET), 1);
    expect(outcomes.map(({ bytes }) => sequenceAndIv(bytes)[0])).toEqual([1, 2, 3, 4]);
    expect(sequenceAndIv(protectOne(mine, PACKET, 1).bytes)[0]).toBe(1);
    pass(mine, Array(2).fill(PACKET), 2);
    expect(protectOne(mine, PACKET, 2).verdict).toBe('no-sa');
    expect(told).toEqual(['1 soft-packets', '2 hard-packets']);
  });
});

describe('a closed SoftwareIpsec', () => {
  it('has given its contexts back and does nothing any more', () => {
    const bench = makeBench();
    {
      using ipsec = bench.ipsec;
      ipsec.add(1, makeSa('outbound'));
      ipsec.add(2, makeSa('inbound'));
      expect(bench.engine.contexts).toBe(2);
    }
    expect(bench.engine.contexts).toBe(0);
    bench.ipsec.close();
    expect(codeOf(() => bench.ipsec.add(1, makeSa('outbound')))).toBe('CLOSED');
    expect(codeOf(() => bench.ipsec.modify(1, makeSa('outbound')))).toBe('CLOSED');
    expect(codeOf(() => protectOne(bench, PACKET, 1))).toBe('CLOSED');
    expect(codeOf(() => unprotectOne(bench, PACKET))).toBe('CLOSED');
    expect(codeOf(() => bench.ipsec.counters(1))).toBe('CLOSED');
  });
});

describe('the engines of the package', () => {
  const names: readonly (EngineName | 'auto')[] = ['openssl', 'ipsec-mb', 'noble', 'auto'];

  it('open what OpenSSL has closed, have it open what they closed, and refuse what was changed on the way', () => {
    const memory = mapAnonymous(64 * 2048);
    const pool = new PacketPool(memory);
    const benches: Bench[] = [];
    for (const engine of names) {
      const ipsec = new SoftwareIpsec(pool, { engine });
      benches.push({ pool, engine: makeBench(2048, 1).engine, ipsec, events: [] });
    }
    let handle = 1;
    let pairs = 0;
    const wrong: string[] = [];
    for (const [id, algorithms] of espTransforms()) {
      const [outbound, inbound] = makePair({ ...algorithms, spi: 0x1000 + handle, replayWindow: 0 });
      const able = benches.filter((bench) => {
        try {
          bench.ipsec.add(handle, outbound);
          bench.ipsec.add(handle + 1, inbound);
          return true;
        } catch (error) {
          if (error instanceof EngineError || error instanceof IpsecError) return false;
          throw error;
        }
      });
      expect(able.length, id).toBeGreaterThan(0);
      const [reference] = able;
      for (const from of able) {
        const out = pass(from, [PACKET, ipv6(counting(77)), ipv4(counting(1)), ipv4(counting(1300))], handle);
        expect(out.every(({ verdict }) => verdict === 'ok')).toBe(true);
        for (const to of from === reference ? able : [reference]) {
          pairs++;
          const inputs = out.map(({ bytes }) => bytes.slice());
          inputs[2][inputs[2].length - 1] ^= 0x10;
          const opened = pass(to, inputs, null);
          const verdicts = opened.map(({ verdict }) => verdict).join();
          if (verdicts !== 'ok,ok,icv,ok') wrong.push(`${id}: ${verdicts}`);
          if (toHex(opened[0].bytes) !== toHex(PACKET)) wrong.push(`${id}: ${toHex(opened[0].bytes)}`);
          if (toHex(opened[3].bytes) !== toHex(ipv4(counting(1300)))) wrong.push(`${id}: ${toHex(opened[3].bytes)}`);
        }
      }
      handle += 2;
    }
    expect(wrong).toEqual([]);
    // OpenSSL with itself, and both ways with the default and with one engine more at least.
    expect(pairs).toBeGreaterThan(espTransforms().size * 4);
    for (const { ipsec } of benches) ipsec.close();
    unmapMemory(memory);
  }, 60_000);
});
