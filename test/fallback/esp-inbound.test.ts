import fc from 'fast-check';
import { beforeEach, describe, expect, it } from 'vitest';
import { CryptoBurst } from '../../src/fallback/engines/engine.ts';
import { transformById } from '../../src/fallback/engines/transform.ts';
import { verdictNames } from '../../src/fallback/verdict.ts';
import { setIpv4Checksum } from '../../src/packet/checksum.ts';
import { PacketFlag } from '../../src/packet/pool.ts';
import { runs } from '../depth.ts';
import {
  ahTransforms,
  type Bench,
  concat,
  counting,
  espTransforms,
  ethernet,
  GCM,
  hex,
  ipv4,
  ipv6,
  makeBench,
  makePair,
  makeSa,
  pass,
  protectOne,
  toHex,
  unprotectOne,
  V4,
  V6,
} from './support.ts';

let bench: Bench;
beforeEach(() => {
  bench = makeBench();
});

/** An ESP packet (AES-128-GCM of `GCM`, IPv4 tunnel) whose plain text is `text` as it is, trailer included. */
function seal(text: Uint8Array, sequence = 1): Uint8Array {
  const transform = transformById('aes-128-gcm-16');
  if (transform === undefined || GCM.aead === undefined) throw new Error('no such transform');
  const inner = concat(
    hex('00001001'),
    Uint8Array.of(0, 0, 0, sequence),
    Uint8Array.of(0, 0, 0, 0, 0, 0, 0, sequence),
    text,
    new Uint8Array(16),
  );
  const at = 0;
  bench.pool.u8.set(inner, at);
  const jobs = new CryptoBurst();
  jobs.count = 1;
  jobs.aadLength = 8;
  jobs.context[0] = bench.engine.createContext(transform, { cipherKey: counting(16), authKey: new Uint8Array(0) });
  jobs.cipherOffset[0] = at + 16;
  jobs.cipherLength[0] = text.length;
  jobs.icvOffset[0] = at + 16 + text.length;
  jobs.iv.set(new Uint32Array(concat(counting(4), inner.subarray(8, 16)).buffer));
  jobs.aad.set(new Uint32Array(inner.slice(0, 8).buffer));
  bench.engine.encrypt(transform, jobs);
  jobs.close();
  const esp = bench.pool.u8.slice(at, at + inner.length);
  return ipv4(esp, { protocol: 50, source: hex('c0000201'), destination: hex('c0000202') });
}

/** Plain text of a packet in a tunnel: payload, padding to four bytes, trailer. */
function plain(payload: Uint8Array, nextHeader = 4): Uint8Array {
  const padLength = -(payload.length + 2) & 3;
  return concat(
    payload,
    Uint8Array.from({ length: padLength }, (_, i) => i + 1),
    Uint8Array.of(padLength, nextHeader),
  );
}

describe('what an authentic peer can get wrong', () => {
  beforeEach(() => bench.ipsec.add(2, makeSa('inbound')));
  const inner = ipv4(counting(18));

  it('is nothing in a packet made right by hand', () => {
    const opened = unprotectOne(bench, seal(plain(inner)));
    expect(opened).toMatchObject({ verdict: 'ok', sa: 2, flags: PacketFlag.secured });
    expect(toHex(opened.bytes)).toBe(toHex(inner));
  });

  const shortened = inner.slice();
  shortened[3] += 1;
  const versionFive = inner.slice();
  versionFive[0] = 0x55;
  const shortHeader = inner.slice();
  shortHeader[0] = 0x44;
  const bad: [string, Uint8Array][] = [
    ['padding that does not count up', concat(inner.subarray(0, 36), hex('0103 02 04'))],
    ['a pad length beyond the payload', concat(inner, hex('ff04'))],
    ['a pad length of all there is, and one more', concat(counting(2), hex('0304'))],
    ['a next header that is no IP packet', plain(inner, 6)],
    ['a next header of the other version', plain(inner, 41)],
    ['an inner packet that says to be longer than it is', plain(shortened)],
    ['an inner packet of version 5', plain(versionFive)],
    ['an inner IPv4 header shorter than 20 bytes', plain(shortHeader)],
    ['an inner IPv4 packet of less than a header', plain(inner.subarray(0, 19))],
    ['an inner IPv6 packet of less than a header', plain(ipv6(counting(4)).subarray(0, 39), 41)],
    ['an inner IPv6 packet that says to be longer than it is', plain(ipv6(counting(6)).subarray(0, 44), 41)],
    ['nothing but a trailer', plain(new Uint8Array(0))],
  ];
  it.each(bad)('%s is dropped as malformed', (_, text) => {
    expect(unprotectOne(bench, seal(text)).verdict).toBe('malformed');
    expect(bench.ipsec.counters(2)).toMatchObject({ packets: 0n, dropped: { malformed: 1 }, sequence: 1n });
  });

  it('TFC padding is cut to the length that the inner packet says', () => {
    const opened = unprotectOne(bench, seal(plain(concat(inner, new Uint8Array(50)))));
    expect(opened.verdict).toBe('ok');
    expect(toHex(opened.bytes)).toBe(toHex(inner));
  });

  it('a dummy packet is recognised, whatever it holds', () => {
    expect(unprotectOne(bench, seal(plain(counting(30), 59))).verdict).toBe('dummy');
    expect(unprotectOne(bench, seal(plain(new Uint8Array(0), 59), 2)).verdict).toBe('dummy');
  });
});

describe('packets of every length', () => {
  const transforms = [...espTransforms()].filter(([id]) => /gcm-16|gmac|cbc\+hmac-sha1-|null\+hmac-sha512/.test(id));
  const cases = transforms.flatMap(([id, algorithms]) =>
    [V4, V6].map((tunnel) => ({ id, algorithms, protocol: 'esp' as const, tunnel, outer: tunnel === V4 ? 4 : 6 })),
  );
  const ah = [...ahTransforms()].map(([id, algorithms]) => ({
    id: `ah ${id}`,
    algorithms,
    protocol: 'ah' as const,
    tunnel: V4,
    outer: 4,
  }));

  it.each([...cases, ...ah])('$id over IPv$outer, cut at any length from 0, is dropped and never throws', (one) => {
    const changes = { ...one.algorithms, protocol: one.protocol, tunnel: one.tunnel, replayWindow: 0 };
    const [outbound, inbound] = makePair(changes);
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const { bytes } = protectOne(bench, ethernet(ipv4(counting(30))), 1, 14);
    for (let length = 0; length < bytes.length; length++) {
      // Once as a frame that was cut, once as an IP packet that says that it is short.
      const cut = bytes.slice(0, length);
      expect(unprotectOne(bench, cut, 14).verdict).toBe('malformed');
      if (length < 14 + 40) continue;
      const honest = cut.slice();
      const size = length - 14;
      if (one.outer === 4) {
        honest[16] = size >>> 8;
        honest[17] = size;
        setIpv4Checksum(honest, 14, 20);
      } else {
        honest[18] = (size - 40) >>> 8;
        honest[19] = size - 40;
      }
      const { verdict } = unprotectOne(bench, honest, 14);
      expect(['malformed', 'icv']).toContain(verdict);
    }
    expect(unprotectOne(bench, concat(bytes, counting(20)), 14).verdict).toBe('ok');
  });
});

describe('packets from anybody', () => {
  beforeEach(() => {
    bench.ipsec.add(2, makeSa('inbound', { replayWindow: 0 }));
    bench.ipsec.add(3, makeSa('inbound', { ...GCM, spi: 0x1002, udpEncap: {} }));
    const auth = { name: 'hmac-sha1', key: counting(20) } as const;
    bench.ipsec.add(
      4,
      makeSa('inbound', { auth, protocol: 'ah', spi: 0x1003, mode: 'transport', options: { esn: true } }),
    );
  });

  it('made of random bytes get a verdict and throw nothing', () => {
    const start = fc.constantFrom('45000028', '4f000050', '60000000', '46000040', '');
    fc.assert(
      fc.property(start, fc.uint8Array({ maxLength: 120 }), fc.constantFrom(0, 14), (head, tail, linkHeader) => {
        const link = linkHeader === 0 ? new Uint8Array(0) : concat(new Uint8Array(12), hex('0800'));
        const { verdict, bytes } = unprotectOne(bench, concat(link, hex(head), tail), linkHeader);
        expect(verdictNames).toContain(verdict);
        expect(verdict).not.toBe('ok');
        if (verdict === 'not-ipsec') expect(toHex(bytes)).toBe(toHex(concat(link, hex(head), tail)));
      }),
      { numRuns: runs(1000) },
    );
  });

  it('that look like ESP or AH but are garbage get a verdict and throw nothing', () => {
    const spi = fc.constantFrom('00001001', '00001002', '00001003', '00000000', 'ffffffff');
    const protocol = fc.constantFrom(50, 51, 17);
    fc.assert(
      fc.property(spi, protocol, fc.boolean(), fc.uint8Array({ maxLength: 100 }), (number, next, isV6, tail) => {
        const body =
          next === 17 ? concat(hex('11941194'), hex('00000000'), hex(number), tail) : concat(hex(number), tail);
        if (next === 17) {
          body[4] = body.length >>> 8;
          body[5] = body.length;
        }
        const addresses = { destination: hex('c0000202') };
        const packet = isV6 ? ipv6(body, { nextHeader: next }) : ipv4(body, { protocol: next, ...addresses });
        const { verdict } = unprotectOne(bench, packet);
        expect(['malformed', 'no-sa', 'icv', 'not-ipsec']).toContain(verdict);
      }),
      { numRuns: runs(1000) },
    );
  });

  it('with an SPI that no SA has, 0 included, are dropped as no-sa', () => {
    for (const spi of ['00000000', 'deadbeef']) {
      const packet = ipv4(concat(hex(spi), counting(60)), { protocol: 50, destination: hex('c0000202') });
      expect(unprotectOne(bench, packet).verdict).toBe('no-sa');
    }
  });

  it('in fragments are dropped, not reassembled', () => {
    const esp = concat(hex('00001001'), counting(60));
    for (const flags of [0x2000, 0x0001, 0x2001]) {
      expect(unprotectOne(bench, ipv4(esp, { protocol: 50, flags })).verdict).toBe('fragment');
    }
    for (const word of ['0001', '0008', '0009']) {
      const fragment = concat(hex('3200'), hex(word), hex('00000001'), esp);
      expect(unprotectOne(bench, ipv6(fragment, { nextHeader: 44 })).verdict).toBe('fragment');
    }
  });

  it('with a wrong IPv4 header checksum are dropped', () => {
    const packet = ipv4(concat(hex('00001001'), counting(60)), { protocol: 50, destination: hex('c0000202') });
    packet[8]--;
    expect(unprotectOne(bench, packet).verdict).toBe('malformed');
  });

  it('that are not IPsec are left alone, byte for byte', () => {
    const arp = concat(counting(12), hex('0806'), counting(28));
    const vlan = concat(counting(12), hex('8100 0001 0800'), ipv4(counting(20)));
    const others = [
      arp,
      vlan,
      ethernet(ipv4(counting(20))),
      ethernet(ipv6(counting(20), { nextHeader: 6 })),
      ethernet(ipv4(counting(8), { flags: 0x0010 })),
    ];
    for (const frame of others) {
      const after = unprotectOne(bench, frame, 14);
      expect(after).toMatchObject({ verdict: 'not-ipsec', sa: 0, flags: 0 });
      expect(toHex(after.bytes)).toBe(toHex(frame));
    }
  });

  it('are opened behind a VLAN tag when the link header says so', () => {
    bench.ipsec.add(1, makeSa('outbound'));
    const frame = concat(counting(12), hex('8100 0001 0800'), ipv4(counting(20)));
    const closed = protectOne(bench, frame, 1, 18);
    expect(toHex(closed.bytes.subarray(0, 18))).toBe(toHex(frame.subarray(0, 18)));
    expect(toHex(unprotectOne(bench, closed.bytes, 18).bytes)).toBe(toHex(frame));
  });

  it('cost a failed decryption nothing but the packet: others of the burst go through', () => {
    bench.ipsec.add(1, makeSa('outbound'));
    const good = [1, 2, 3].map((size) => protectOne(bench, ipv4(counting(size)), 1).bytes);
    const bad = good[1].slice();
    bad[bad.length - 1] ^= 1;
    const verdicts = pass(bench, [good[0], bad, ipv4(counting(4)), good[2]], null).map((outcome) => outcome.verdict);
    expect(verdicts).toEqual(['ok', 'icv', 'not-ipsec', 'ok']);
  });
});
