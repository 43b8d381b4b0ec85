import { createCipheriv, createDecipheriv } from 'node:crypto';
import { inspect } from 'node:util';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type EsnState, InlineCrypto, type InlineCryptoParameters } from '../../src/fallback/inline-crypto.ts';
import { verdictNames } from '../../src/fallback/verdict.ts';
import { checksum } from '../../src/packet/checksum.ts';
import { PacketPool } from '../../src/packet/pool.ts';
import { NodeEngine, plainMemory } from './node-engine.ts';
import {
  concat,
  counting,
  ethernet,
  hex,
  ipv4,
  ipv6,
  makeBench,
  makeSa,
  protectOne,
  toHex,
  unprotectOne,
} from './support.ts';

const key = counting(16);
const salt = counting(4);

const parameters = (change: Partial<InlineCryptoParameters> = {}): InlineCryptoParameters => ({
  direction: 'encrypt',
  key,
  salt,
  icvLength: 16,
  extended: null,
  ...change,
});

interface Bench {
  readonly pool: PacketPool;
  readonly crypto: InlineCrypto;
}

function bench(stride = 4096, count = 64): Bench {
  const memory = plainMemory(stride * count);
  const pool = new PacketPool(memory, { stride });
  return { pool, crypto: new InlineCrypto(pool, { engine: [new NodeEngine(memory)] }) };
}

interface Outcome {
  readonly verdict: string;
  readonly bytes: Uint8Array;
  readonly next: number;
}

/** Packets through `encrypt` or `decrypt` as one burst; each with its context, and for `encrypt` its next header. */
function pass(
  { pool, crypto }: Bench,
  way: 'encrypt' | 'decrypt',
  inputs: readonly Uint8Array[],
  context: number | ((i: number) => number),
  next = 4,
  linkHeader = 0,
): Outcome[] {
  const n = inputs.length;
  const packets = new Uint32Array(n);
  const contexts = Uint32Array.from(inputs, (_, i) => (typeof context === 'number' ? context : context(i)));
  const nextHeaders = new Uint8Array(n).fill(next);
  const verdicts = new Uint8Array(n).fill(0xff);
  expect(pool.allocate(packets, n)).toBe(n);
  inputs.forEach((bytes, i) => {
    pool.write(packets[i], bytes);
  });
  crypto[way](packets, contexts, nextHeaders, n, linkHeader, verdicts);
  const out = inputs.map((_, i) => ({
    verdict: verdictNames[verdicts[i]],
    bytes: pool.read(packets[i]).slice(),
    next: nextHeaders[i],
  }));
  pool.free(packets, n);
  return out;
}

/** What a caller supplies: SPI, number, an IV field with something in it, and the payload. */
function espPayload(sequence: number, payload: Uint8Array, spi = 0x1001): Uint8Array {
  const header = Buffer.alloc(16, 0xee);
  header.writeUInt32BE(spi, 0);
  header.writeUInt32BE(sequence, 4);
  return concat(header, payload);
}

const espPacket = (sequence: number, payload: Uint8Array) => ipv4(espPayload(sequence, payload), { protocol: 50 });

const inner = ipv4(counting(37));

/** What `node:crypto` makes of an ESP packet without IP header, whose number has `high` above it, or null. */
function judge(esp: Uint8Array, icvLength: number, high: number | null, aesKey = key): Buffer | null {
  const number = Buffer.alloc(4);
  number.writeUInt32BE(high ?? 0);
  const aad = high === null ? esp.subarray(0, 8) : concat(esp.subarray(0, 4), number, esp.subarray(4, 8));
  const nonce = concat(salt, esp.subarray(8, 16));
  const name = `aes-${aesKey.length * 8}-gcm` as 'aes-128-gcm';
  const cipher = createDecipheriv(name, aesKey, nonce, { authTagLength: icvLength });
  cipher.setAAD(aad).setAuthTag(esp.subarray(esp.length - icvLength));
  try {
    return Buffer.concat([cipher.update(esp.subarray(16, esp.length - icvLength)), cipher.final()]);
  } catch {
    return null;
  }
}

describe('inline crypto, encrypting', () => {
  it.each([16, 24, 32].flatMap((size) => [8, 12, 16].map((icv) => [size, icv])))(
    'makes what OpenSSL opens: AES key of %i bytes, ICV of %i',
    (size, icvLength) => {
      const tools = bench();
      const aesKey = counting(size, 9);
      const context = tools.crypto.create(parameters({ key: aesKey, icvLength }));
      const inputs = [0, 1, 2, 3, 4, 5, 64, 1400].map((length, i) => espPacket(i + 1, counting(length)));
      pass(tools, 'encrypt', inputs, context).forEach(({ verdict, bytes }, i) => {
        expect(verdict).toBe('ok');
        const payload = inputs[i].subarray(36);
        const plain = judge(bytes.subarray(20), icvLength, null, aesKey);
        const padLength = -(payload.length + 2) & 3;
        const padding = Uint8Array.from({ length: padLength }, (_, pad) => pad + 1);
        expect(plain && toHex(plain)).toBe(toHex(concat(payload, padding, Uint8Array.of(padLength, 4))));
        expect(toHex(bytes.subarray(20, 28))).toBe(toHex(inputs[i].subarray(20, 28)));
        expect(Buffer.from(bytes).readUInt16BE(2)).toBe(bytes.length);
        expect(checksum(bytes, 0, 20)).toBe(0);
      });
    },
  );

  it('makes what an SA of the peer opens, over both IP versions and behind extension headers and a link header', () => {
    const tools = bench();
    const context = tools.crypto.create(parameters());
    const peer = makeBench();
    const sa = { spi: 0x1001, aead: { name: 'aes-gcm', key, salt, icvLength: 16 } } as const;
    peer.ipsec.add(1, makeSa('inbound', { ...sa, tunnel: { source: '10.0.0.1', destination: '10.1.0.1' } }));
    const six = { source: '2001:db8:a::1', destination: '2001:db8:b::1' };
    peer.ipsec.add(2, makeSa('inbound', { ...sa, tunnel: six }));
    const options = hex('3200010400000000');
    const packets = [
      espPacket(1, inner),
      ipv4(espPayload(2, inner), { protocol: 50, options: hex('01010101') }),
      ipv6(espPayload(3, inner), { nextHeader: 50 }),
      ipv6(concat(options, espPayload(4, inner)), { nextHeader: 60 }),
    ].map(ethernet);
    for (const { verdict, bytes } of pass(tools, 'encrypt', packets, context, 4, 14)) {
      expect(verdict).toBe('ok');
      const opened = unprotectOne(peer, bytes, 14);
      expect([opened.verdict, toHex(opened.bytes.subarray(14))]).toEqual(['ok', toHex(inner)]);
    }
  });

  it('counts IVs itself, from 0, whatever the packets say', () => {
    const tools = bench();
    const context = tools.crypto.create(parameters());
    const out = pass(
      tools,
      'encrypt',
      [7, 7, 7, 1].map((sequence) => espPacket(sequence, inner)),
      context,
    );
    expect(out.map(({ bytes }) => Buffer.from(bytes).readBigUInt64BE(28))).toEqual([0n, 1n, 2n, 3n]);
    expect(tools.crypto.counters(context)).toEqual({ packets: 4n, iv: 4n });
    const other = tools.crypto.create(parameters({ key: counting(16, 77) }));
    const [fresh] = pass(tools, 'encrypt', [espPacket(1, inner)], other);
    expect(Buffer.from(fresh.bytes).readBigUInt64BE(28)).toBe(0n);
  });

  it('derives the high half of the number as its owner has said, and the new state counts from one packet to the next', () => {
    const tools = bench();
    const context = tools.crypto.create(parameters({ extended: { esn: 5, newWindow: false } }));
    const half = 2 ** 31;
    const cases: [EsnState, number, number][] = [
      [{ esn: 5, newWindow: false }, 0, 5],
      [{ esn: 5, newWindow: false }, half - 1, 5],
      [{ esn: 5, newWindow: false }, 2 ** 32 - 1, 5],
      [{ esn: 5, newWindow: true }, half, 5],
      [{ esn: 5, newWindow: true }, 2 ** 32 - 1, 5],
      [{ esn: 5, newWindow: true }, 0, 6],
      [{ esn: 5, newWindow: true }, half - 1, 6],
      [{ esn: 6, newWindow: false }, half - 1, 6],
      [{ esn: 0xffffffff, newWindow: false }, half, 0xffffffff],
    ];
    for (const [state, sequence, high] of cases) {
      tools.crypto.setEsn(context, state);
      const [{ bytes }] = pass(tools, 'encrypt', [espPacket(sequence, inner)], context);
      const highs = [high - 1, high, high + 1].filter((one) => one >= 0 && one < 2 ** 32);
      expect(highs.filter((one) => judge(bytes.subarray(20), 16, one) !== null)).toEqual([high]);
    }
  });

  it('ends a context whose IVs are used up, and repeats none', () => {
    const tools = bench();
    const context = tools.crypto.create(parameters());
    const packet = espPacket(1, inner);
    const words = (low: number, high: number) => advance(tools.crypto, context, low, high);
    words(0xffffffff, 0);
    expect(pass(tools, 'encrypt', [packet, packet], context).map((one) => iv(one))).toEqual([0xffffffffn, 1n << 32n]);
    words(0xfffffffe, 0xffffffff);
    const out = pass(tools, 'encrypt', [packet, packet, packet], context);
    expect(out.map(({ verdict }) => verdict)).toEqual(['ok', 'ok', 'sequence-overflow']);
    expect(out.slice(0, 2).map((one) => iv(one))).toEqual([(1n << 64n) - 2n, (1n << 64n) - 1n]);
    expect(toHex(out[2].bytes)).toBe(toHex(packet));
    expect(tools.crypto.counters(context).iv).toBe(1n << 64n);
    expect(pass(tools, 'encrypt', [packet], context)[0].verdict).toBe('sequence-overflow');
  });

  it('leaves alone what is no ESP packet and refuses what is none that can be, without using an IV', () => {
    const tools = bench(320);
    const context = tools.crypto.create(parameters());
    const whole = espPacket(1, inner);
    const long = espPacket(1, counting(150));
    const lying = whole.slice();
    lying[3] += 8;
    const cases: [Uint8Array, string][] = [
      [ipv4(inner), 'not-ipsec'],
      [ipv6(inner), 'not-ipsec'],
      [new Uint8Array(0), 'not-ipsec'],
      [whole.subarray(0, 19), 'not-ipsec'],
      [hex('f5'.repeat(40)), 'not-ipsec'],
      [lying, 'malformed'],
      [ipv4(counting(15), { protocol: 50 }), 'malformed'],
      [ipv4(espPayload(1, inner), { protocol: 50, flags: 0x2000 }), 'fragment'],
      [ipv4(espPayload(1, inner), { protocol: 50, flags: 3 }), 'fragment'],
      [ipv6(concat(hex('3200000100000000'), espPayload(1, inner)), { nextHeader: 44 }), 'fragment'],
      [long, 'no-room'],
    ];
    for (const [packet, verdict] of cases) {
      const [out] = pass(tools, 'encrypt', [packet], context);
      expect([out.verdict, toHex(out.bytes)]).toEqual([verdict, toHex(packet)]);
    }
    expect(tools.crypto.counters(context)).toEqual({ packets: 0n, iv: 0n });
  });

  it('takes contexts of every kind in one burst, and none that is for the other way, gone or never was', () => {
    const tools = bench();
    const a = tools.crypto.create(parameters());
    const b = tools.crypto.create(parameters({ key: counting(32, 3), icvLength: 8 }));
    const c = tools.crypto.create(parameters({ extended: { esn: 1, newWindow: false }, key: counting(16, 5) }));
    const d = tools.crypto.create(parameters({ direction: 'decrypt' }));
    const gone = tools.crypto.create(parameters());
    tools.crypto.destroy(gone);
    const contexts = [a, b, c, b, a, d, gone, 0, 99, a];
    const out = pass(
      tools,
      'encrypt',
      contexts.map((_, i) => espPacket(i, inner)),
      (i) => contexts[i],
    );
    const expected = contexts.map((one) => ([a, b, c].includes(one) ? 'ok' : 'no-sa'));
    expect(out.map(({ verdict }) => verdict)).toEqual(expected);
    const ivs = out.filter(({ verdict }) => verdict === 'ok').map((one) => iv(one));
    expect(ivs).toEqual([0n, 0n, 0n, 1n, 1n, 2n]);
    expect(judge(out[9].bytes.subarray(20), 16, null)).not.toBeNull();
    expect(judge(out[3].bytes.subarray(20), 8, null, counting(32, 3))).not.toBeNull();
  });

  it('takes bursts that are longer than those of an engine', () => {
    const tools = bench(512, 600);
    const context = tools.crypto.create(parameters());
    const inputs = Array.from({ length: 600 }, (_, i) => espPacket(i, counting(i % 50)));
    const out = pass(tools, 'encrypt', inputs, context);
    expect(out.every(({ verdict, bytes }) => verdict === 'ok' && judge(bytes.subarray(20), 16, null) !== null)).toBe(
      true,
    );
    expect(new Set(out.map((one) => iv(one))).size).toBe(600);
  });
});

describe('inline crypto, decrypting', () => {
  const make = (extended: EsnState | null = null) => {
    const tools = bench();
    const context = tools.crypto.create(parameters({ direction: 'decrypt', extended }));
    const peer = makeBench();
    const aead = { name: 'aes-gcm', key, salt, icvLength: 16 } as const;
    return { tools, context, peer, aead };
  };

  it('opens what an SA of the peer has made; ESP header and IV stay, the trailer goes and is reported', () => {
    const { tools, context, peer, aead } = make();
    peer.ipsec.add(1, makeSa('outbound', { aead }));
    peer.ipsec.add(2, makeSa('outbound', { aead, mode: 'transport' }));
    for (const [handle, next, payload] of [
      [1, 4, inner],
      [2, 17, inner.subarray(20)],
    ] as const) {
      const made = protectOne(peer, inner, handle).bytes;
      const [out] = pass(tools, 'decrypt', [made], context, 0);
      expect([out.verdict, out.next]).toEqual(['ok', next]);
      expect(toHex(out.bytes.subarray(20, 36))).toBe(toHex(made.subarray(20, 36)));
      expect(toHex(out.bytes.subarray(36))).toBe(toHex(payload));
      expect(Buffer.from(out.bytes).readUInt16BE(2)).toBe(out.bytes.length);
      expect(checksum(out.bytes, 0, 20)).toBe(0);
    }
  });

  it('opens what it has made itself, and cuts what the link has padded', () => {
    const { tools, context } = make();
    const encrypt = tools.crypto.create(parameters());
    const packet = ethernet(ipv6(espPayload(9, inner), { nextHeader: 50 }));
    const [{ bytes }] = pass(tools, 'encrypt', [concat(packet, new Uint8Array(6))], encrypt, 4, 14);
    const [out] = pass(tools, 'decrypt', [concat(bytes, new Uint8Array(9))], context, 0, 14);
    expect(out.verdict).toBe('ok');
    const expected = packet.slice();
    expected.set(bytes.subarray(14 + 40 + 8, 14 + 40 + 16), 14 + 40 + 8);
    expect(toHex(out.bytes)).toBe(toHex(expected));
  });

  it('follows the state machine of the manual page over the ends and the middles of 2^32', () => {
    const { tools, context, peer, aead } = make({ esn: 0, newWindow: false });
    const half = 1n << 31n;
    // What the owner says, and the 64-bit numbers that are then read rightly.
    const steps: [EsnState, bigint[], bigint[]][] = [
      [{ esn: 0, newWindow: false }, [1n, half, 2n * half - 1n], [2n * half]],
      [{ esn: 0, newWindow: true }, [half, 2n * half - 1n, 2n * half, 3n * half - 1n], [3n * half, 5n]],
      [{ esn: 1, newWindow: false }, [2n * half, 3n * half, 4n * half - 1n], [4n * half, 2n * half - 1n]],
      [{ esn: 1, newWindow: true }, [3n * half, 4n * half, 5n * half - 1n], [2n * half]],
    ];
    let handle = 0;
    for (const [state, right, wrong] of steps) {
      tools.crypto.setEsn(context, state);
      for (const sequence of [...right, ...wrong]) {
        handle++;
        peer.ipsec.add(handle, makeSa('outbound', { aead, options: { esn: true }, initial: { sequence } }));
        const [out] = pass(tools, 'decrypt', [protectOne(peer, inner, handle).bytes], context);
        expect([sequence, out.verdict]).toEqual([sequence, right.includes(sequence) ? 'ok' : 'icv']);
      }
    }
  });

  it('lets nothing through that was changed, in whatever bit', () => {
    const { tools, context, peer, aead } = make();
    peer.ipsec.add(1, makeSa('outbound', { aead }));
    const { bytes } = protectOne(peer, inner, 1);
    fc.assert(
      fc.property(fc.nat({ max: bytes.length * 8 - 1 }), (bit) => {
        const changed = bytes.slice();
        changed[bit >>> 3] ^= 1 << (bit & 7);
        const [out] = pass(tools, 'decrypt', [changed], context);
        expect(out.verdict).not.toBe('ok');
        // Nothing of what was not authentic can be read.
        if (out.verdict === 'icv') expect(out.bytes.length).toBe(0);
      }),
    );
  });

  it('survives any bytes', () => {
    const { tools, context } = make();
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 120 }), fc.boolean(), (noise, header) => {
        const packet = header ? ipv4(noise, { protocol: 50 }) : noise;
        const [out] = pass(tools, 'decrypt', [packet], context);
        expect(out.verdict).not.toBe('ok');
      }),
    );
  });

  it('refuses padding that is none, and a padding length beyond the packet', () => {
    const { tools, context } = make();
    // Whoever has the key can make authentic nonsense: here by encrypting a payload that becomes trailer and all.
    const forge = (trailer: Uint8Array) => {
      const other = bench();
      const encrypt = other.crypto.create(parameters());
      const [{ bytes }] = pass(other, 'encrypt', [espPacket(1, counting(18))], encrypt);
      const plain = judge(bytes.subarray(20), 16, null)!;
      const cut = bytes.slice();
      const stream = plain.map((byte, i) => byte ^ bytes[36 + i]);
      const wanted = concat(counting(20 - trailer.length), trailer);
      cut.set(
        wanted.map((byte, i) => byte ^ stream[i]),
        36,
      );
      return resealed(cut);
    };
    expect(pass(tools, 'decrypt', [forge(hex('01020204'))], context)[0].verdict).toBe('ok');
    expect(pass(tools, 'decrypt', [forge(hex('01030204'))], context)[0].verdict).toBe('malformed');
    expect(pass(tools, 'decrypt', [forge(hex('0102ff04'))], context)[0].verdict).toBe('malformed');
  });
});

describe('contexts of inline crypto', () => {
  it('are refused for keys and ICVs that AES-GCM does not have', () => {
    const { crypto } = bench();
    const unknown = expect.objectContaining({ code: 'TRANSFORM_UNKNOWN' });
    for (const change of [{ key: counting(15) }, { icvLength: 10 }, { salt: counting(3) }, { key: counting(0) }]) {
      expect(() => crypto.create(parameters(change))).toThrow(unknown);
    }
  });

  it('are many, and their numbers come back', () => {
    const { crypto } = bench();
    const all = Array.from({ length: 500 }, (_, i) => crypto.create(parameters({ key: counting(16, i) })));
    expect(new Set(all).size).toBe(500);
    crypto.destroy(all[7]);
    expect(() => crypto.destroy(all[7])).toThrow(expect.objectContaining({ code: 'NO_SUCH_SA' }));
    expect(crypto.create(parameters())).toBe(all[7]);
    expect(crypto.counters(all[7])).toEqual({ packets: 0n, iv: 0n });
    expect(() => crypto.setEsn(all[7], { esn: 1, newWindow: false })).toThrow(
      expect.objectContaining({ code: 'ESN_OFF' }),
    );
    expect(() => crypto.counters(0)).toThrow(expect.objectContaining({ code: 'NO_SUCH_SA' }));
  });

  it('are over when it is closed, and show no key before', () => {
    const tools = bench();
    const context = tools.crypto.create(parameters({ key: counting(16, 0xc0) }));
    expect(inspect(tools.crypto, { depth: 9 })).not.toContain('192, 199');
    tools.crypto.close();
    tools.crypto.close();
    const closed = expect.objectContaining({ code: 'CLOSED' });
    expect(() => tools.crypto.create(parameters())).toThrow(closed);
    expect(() => pass(tools, 'encrypt', [espPacket(1, inner)], context)).toThrow(closed);
  });
});

function iv({ bytes }: Outcome): bigint {
  return Buffer.from(bytes).readBigUInt64BE(28);
}

/** Brings a context to an IV that no test would live to see otherwise. */
function advance(crypto: InlineCrypto, context: number, low: number, high: number): void {
  crypto.skipIvs(context, (BigInt(high) << 32n) | BigInt(low));
}

/** A packet with `key` whose ciphertext was changed, with the right ICV for it. */
function resealed(packet: Uint8Array): Uint8Array {
  const esp = packet.subarray(20);
  const nonce = concat(salt, esp.subarray(8, 16));
  const cipher = createDecipheriv('aes-128-gcm', key, nonce);
  const plain = cipher.update(esp.subarray(16, esp.length - 16));
  const seal = createCipheriv('aes-128-gcm', key, nonce).setAAD(esp.subarray(0, 8));
  seal.update(plain);
  seal.final();
  const out = packet.slice();
  out.set(seal.getAuthTag(), packet.length - 16);
  return out;
}
