import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, afterEach, beforeEach, describe, expect, test } from 'vitest';
import { InputError } from '../../src/errors.ts';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import { validateSas } from '../../src/ipsec/validate.ts';
import { CaptureReader, CaptureWriter } from '../../src/packet/capture-file.ts';
import { anyDropped, EspPipeline, type EspReport } from '../../tools/esp-pipeline.ts';
import { runs } from '../depth.ts';

const data = new URL('../data/', import.meta.url).pathname;
const captures = readdirSync(data)
  .filter((name) => name.endsWith('.pcap'))
  .map((name) => join(data, name));

let folder = '';
let serial = 0;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-esp-'));
});
afterEach(() => {
  rmSync(folder, { recursive: true });
});

type Json = Record<string, unknown>;
const hex = (length: number, first = 1): string =>
  Array.from({ length }, (_, i) => ((first + i) & 0xff).toString(16).padStart(2, '0')).join('');

const gcm = { aead: { name: 'aes-gcm', key: hex(16), salt: hex(4) } };
const v4 = { source: '192.0.2.1', destination: '192.0.2.2' };
const v6 = { source: '2001:db8::1', destination: '2001:db8::2' };
const tunnel: Json = { direction: 'outbound', mode: 'tunnel', spi: 0x1000, tunnel: v4, ...gcm };
const transport: Json = { direction: 'outbound', mode: 'transport', spi: 0x1000, ...gcm };
/** Keeps the library of the engine as it is between the pipelines: to begin with it takes longer than most of them. */
const held = new EspPipeline(validateSas([tunnel]), 'auto');
afterAll(() => held[Symbol.dispose]());
const receive = (sa: Json): Json => ({ ...sa, direction: 'inbound' });

/** Takes `input` through `sas` and returns the report and the path of the result. */
function esp(input: string, sas: Json[] | SecurityAssociation[]): { report: EspReport; output: string } {
  const output = join(folder, `${serial++}.pcap`);
  using reader = new CaptureReader(input);
  using pipeline = new EspPipeline(isValidated(sas) ? sas : validateSas(sas), 'auto');
  let writer: CaptureWriter | undefined;
  const open = (linkType: number): CaptureWriter => {
    writer ??= new CaptureWriter(output, { linkType, nanoseconds: reader.decoder.nanoseconds });
    return writer;
  };
  try {
    while (pipeline.step(reader, open));
    open(reader.decoder.linkType ?? 1);
  } finally {
    writer?.close();
  }
  return { report: structuredClone(pipeline.report), output };
}

function isValidated(sas: Json[] | SecurityAssociation[]): sas is SecurityAssociation[] {
  return sas.every((sa) => 'initial' in sa && 'lifetime' in sa);
}

interface Packet {
  bytes: string;
  seconds: number;
  nanoseconds: number;
  linkType: number;
}

function packets(path: string): Packet[] {
  using reader = new CaptureReader(path);
  // One record is used for all: it must be looked at while it is current.
  return Array.from(reader, (record) => ({
    bytes: Buffer.from(record.bytes()).toString('hex'),
    seconds: record.seconds,
    nanoseconds: record.nanoseconds,
    linkType: record.linkType,
  }));
}

/** Writes frames as a capture. */
function capture(frames: Uint8Array[], linkType: number): string {
  const path = join(folder, `${serial++}.pcap`);
  using writer = new CaptureWriter(path, { linkType });
  frames.forEach((frame, i) => {
    writer.write(frame, 0, frame.length, 1_700_000_000 + i, 1000 * i);
  });
  return path;
}

const bytesOf = (text: string): Uint8Array => Uint8Array.from(Buffer.from(text, 'hex'));
const isIp = (frame: string): boolean => ['0800', '86dd'].includes(frame.slice(24, 28));
const dropped = (report: EspReport, reason: string): number => report.dropped[reason];
const total = (report: EspReport): number => Object.values(report.dropped).reduce((sum, count) => sum + count, 0);

/** Real IPv4 packets without their Ethernet headers. */
const ipv4 = packets(join(data, 'dns-ipv4.pcap'))
  .filter(({ bytes }) => bytes.slice(24, 28) === '0800')
  .map(({ bytes }) => bytesOf(bytes.slice(28)));
const ipv6 = packets(join(data, 'dns-ipv6.pcap')).map(({ bytes }) => bytesOf(bytes.slice(28)));

describe('real captures come back as they were', () => {
  const modes: [string, Json][] = [
    ['ESP tunnel in IPv4', tunnel],
    ['ESP tunnel in IPv6', { ...tunnel, tunnel: v6 }],
    ['ESP tunnel in UDP', { ...tunnel, udpEncap: {} }],
    ['ESP tunnel with ESN and TFC padding', { ...tunnel, options: { esn: true }, tfcPadding: 64 }],
    [
      'ESP tunnel, AES-CBC and HMAC-SHA-256',
      {
        ...tunnel,
        aead: undefined,
        cipher: { name: 'aes-cbc', key: hex(32) },
        auth: { name: 'hmac-sha256', key: hex(32) },
      },
    ],
    ['AH tunnel', { ...tunnel, protocol: 'ah', aead: undefined, auth: { name: 'hmac-sha1', key: hex(20) } }],
  ];
  test.each(modes)('%s', (name, sa) => {
    for (const path of captures) {
      const before = packets(path);
      const protectable = before.filter(({ bytes }) => isIp(bytes)).length;
      const out = esp(path, [sa]);
      expect(out.report).toMatchObject({
        in: before.length,
        out: before.length,
        protected: protectable,
        verified: 0,
        bypassed: before.length - protectable,
        dummy: 0,
      });
      expect(anyDropped(out.report)).toBe(false);
      const protectedPackets = packets(out.output);
      protectedPackets.forEach((packet, i) => {
        // Addresses of the link stay, and so do the time stamps.
        expect(packet.bytes.slice(0, 24)).toBe(before[i].bytes.slice(0, 24));
        expect([packet.seconds, packet.nanoseconds]).toEqual([before[i].seconds, before[i].nanoseconds]);
        if (isIp(before[i].bytes)) expect(packet.bytes.includes(before[i].bytes.slice(28))).toBe(name.startsWith('AH'));
        else expect(packet.bytes).toBe(before[i].bytes);
      });
      const back = esp(out.output, [receive(sa)]);
      expect(back.report).toMatchObject({ verified: protectable, protected: 0, out: before.length });
      expect(anyDropped(back.report)).toBe(false);
      expect(packets(back.output)).toEqual(before);
    }
  });

  test('in transport mode, but for fragments, which it must not protect', () => {
    for (const path of captures) {
      const before = packets(path);
      const out = esp(path, [transport]);
      const fragments = path.includes('fragments');
      expect(dropped(out.report, 'fragment') > 0).toBe(fragments);
      expect(total(out.report)).toBe(dropped(out.report, 'fragment'));
      const back = esp(out.output, [receive(transport)]);
      expect(anyDropped(back.report)).toBe(false);
      if (!fragments) expect(packets(back.output)).toEqual(before);
    }
  });
});

describe('selectors', () => {
  test('choose the SA, the first match wins, and the rest is copied', () => {
    const dns = { ...tunnel, selector: { protocol: 17, destinationPort: 53, source: '10.10.0.1' } };
    const client = {
      ...tunnel,
      spi: 0x2000,
      selector: { source: '10.10.0.1' },
      aead: { ...gcm.aead, key: hex(16, 9) },
    };
    const path = join(data, 'dns-ipv4.pcap');
    const { report, output } = esp(path, [dns, client]);
    const spis = packets(output).map(({ bytes }) => (bytes.slice(46, 48) === '32' ? bytes.slice(68, 76) : 'clear'));
    const count = (what: string): number => spis.filter((spi) => spi === what).length;
    expect(count('00001000')).toBe(5);
    expect(count('00002000')).toBe(5);
    expect(report).toMatchObject({ protected: 10, bypassed: 12 });
    expect(count('clear')).toBe(12);
  });

  test('that need ports of a fragment drop it', () => {
    const { report, output } = esp(join(data, 'fragments-ipv4.pcap'), [{ ...tunnel, selector: { sourcePort: 7 } }]);
    // Echo requests have no ports, and their later fragments say ICMP too.
    expect(report).toMatchObject({ protected: 0, bypassed: 20 });
    expect(packets(output).length).toBe(20);
    const udp = capture([bytesOf('45000024000100b940117d340a0a00010a0a0002aabbccddaabbccddaabbccddaabbccdd')], 101);
    expect(dropped(esp(udp, [{ ...tunnel, selector: { sourcePort: 7 } }]).report, 'fragment')).toBe(1);
  });
});

describe('what arrives and is not right is dropped by reason', () => {
  function protectedFrames(sa: Json = tunnel): Uint8Array[] {
    return packets(esp(capture(ipv4, 101), [sa]).output).map(({ bytes }) => bytesOf(bytes));
  }

  test('a flipped bit anywhere behind the outer header is icv, no-sa or replay, never delivered', () => {
    const [frame] = protectedFrames();
    const flipped = Array.from({ length: (frame.length - 20) * 8 }, (_, bit) => {
      const copy = frame.slice();
      copy[20 + (bit >> 3)] ^= 1 << (bit & 7);
      return copy;
    });
    const { report, output } = esp(capture(flipped, 101), [receive(tunnel)]);
    expect(report.out).toBe(0);
    expect(packets(output)).toEqual([]);
    expect(dropped(report, 'no-sa')).toBe(32);
    expect(dropped(report, 'icv') + dropped(report, 'no-sa') + dropped(report, 'replay')).toBe(flipped.length);
  });

  test('a packet twice is a replay', () => {
    const frames = protectedFrames();
    const { report } = esp(capture([...frames, frames[3], frames[0]], 101), [receive(tunnel)]);
    expect(report).toMatchObject({ verified: frames.length, out: frames.length });
    expect(dropped(report, 'replay')).toBe(2);
  });

  test('an unknown SPI is no-sa when there is an inbound SA, and left alone when there is none', () => {
    const frames = capture(protectedFrames(), 101);
    expect(dropped(esp(frames, [receive({ ...tunnel, spi: 7 })]).report, 'no-sa')).toBe(ipv4.length);
    const other = { ...tunnel, selector: { source: '203.0.113.0/24' } };
    expect(esp(frames, [other]).report).toMatchObject({ bypassed: ipv4.length, out: ipv4.length });
  });

  test('an SA past its hard limit is expired', () => {
    const { report } = esp(capture(ipv4, 101), [{ ...tunnel, lifetime: { hardPackets: 3 } }]);
    expect(report).toMatchObject({ protected: 3, out: 3 });
    expect(dropped(report, 'expired')).toBe(ipv4.length - 3);
  });

  test('an SA without sequence numbers left stops', () => {
    const { report } = esp(capture(ipv4, 101), [{ ...tunnel, initial: { sequence: '0xfffffffe' } }]);
    expect(report).toMatchObject({ protected: 2, out: 2 });
    expect(dropped(report, 'sequence-overflow')).toBe(ipv4.length - 2);
  });

  test('a packet that the capture has cut is malformed, never sent in the clear', () => {
    const { report } = esp(capture([ipv4[0].subarray(0, 25)], 101), [tunnel]);
    expect(report).toMatchObject({ protected: 0, out: 0, bypassed: 0 });
    expect(dropped(report, 'malformed')).toBe(1);
  });
});

describe('link types', () => {
  test.each([
    ['RAW', 101, [...ipv4, ...ipv6]],
    ['IPv4', 228, ipv4],
    ['IPv6', 229, ipv6],
  ])('%s is read and written', (_name, linkType, frames) => {
    const path = capture(frames, linkType);
    const sa = { ...tunnel, tunnel: linkType === 229 ? v6 : v4 };
    const out = esp(path, [sa]);
    expect(out.report.protected).toBe(frames.length);
    expect(packets(out.output).every((packet) => packet.linkType === linkType)).toBe(true);
    expect(packets(esp(out.output, [receive(sa)]).output)).toEqual(packets(path));
  });

  test('a packet that the link type cannot carry is dropped as link-type', () => {
    const { report, output } = esp(capture(ipv4, 228), [{ ...tunnel, tunnel: v6 }]);
    expect(report).toMatchObject({ out: 0, protected: ipv4.length });
    expect(dropped(report, 'link-type')).toBe(ipv4.length);
    expect(packets(output)).toEqual([]);
  });

  test('tags of VLANs stay in front of what is protected', () => {
    const vlan = [0x81, 0, 0, 5];
    const tagged = [vlan, [0x88, 0xa8, 0, 6, ...vlan], [...vlan, ...vlan, ...vlan], []].map((tags) =>
      Uint8Array.from([...new Uint8Array(12), ...tags, 8, 0, ...ipv4[0]]),
    );
    const path = capture(tagged, 1);
    const out = esp(path, [{ ...tunnel, tunnel: v6 }]);
    expect(out.report.protected).toBe(4);
    packets(out.output).forEach(({ bytes }, i) => {
      const tags = tagged[i].length - 14 - ipv4[0].length;
      expect(bytes.slice(0, 2 * (12 + tags))).toBe(Buffer.from(tagged[i].subarray(0, 12 + tags)).toString('hex'));
      expect(bytes.slice(2 * (12 + tags), 2 * (15 + tags))).toBe('86dd60');
    });
    expect(packets(esp(out.output, [receive({ ...tunnel, tunnel: v6 })]).output)).toEqual(packets(path));
  });

  test('behind more tags than can be looked behind a packet is dropped, not sent in the clear', () => {
    const tags = Array.from({ length: 13 }, () => [0x81, 0, 0, 5]).flat();
    const frame = Uint8Array.from([...new Uint8Array(12), ...tags, 8, 0, ...ipv4[0]]);
    const { report, output } = esp(capture([frame], 1), [tunnel]);
    expect(dropped(report, 'malformed')).toBe(1);
    expect(packets(output)).toEqual([]);
  });

  test('the longest packet of IPv6, which is longer than that of IPv4, is read and written', () => {
    const longest = new Uint8Array(40 + 65_535);
    longest.set(ipv6[0].subarray(0, 40));
    longest.set([0xff, 0xff, 59], 4);
    const path = capture([longest], 229);
    const { report, output } = esp(path, [receive(tunnel)]);
    expect(report).toMatchObject({ in: 1, out: 1, bypassed: 1 });
    expect(packets(output)).toEqual(packets(path));
  });

  test('others are refused', () => {
    expect(() => esp(capture(ipv4, 113), [tunnel])).toThrow(
      expect.objectContaining({ code: 'LINK_TYPE_UNSUPPORTED', constructor: InputError }),
    );
  });

  test('an empty capture gives an empty capture of its link type', () => {
    const { report, output } = esp(capture([], 229), [tunnel]);
    expect(report).toMatchObject({ in: 0, out: 0 });
    using reader = new CaptureReader(output);
    expect(reader.next()).toBeNull();
    expect(reader.decoder.linkType).toBe(229);
  });
});

describe('whatever is in a capture', () => {
  const all = validateSas([
    { ...tunnel, selector: { protocol: 17 } },
    { ...transport, spi: 0x2000, aead: { ...gcm.aead, key: hex(16, 50) }, selector: { destinationPort: 53 } },
    { ...receive(tunnel), udpEncap: {} },
    {
      ...receive({ ...tunnel, tunnel: v6 }),
      protocol: 'ah',
      aead: undefined,
      auth: { name: 'aes-cmac', key: hex(16) },
    },
    receive({ ...transport, spi: 0x3000 }),
  ]);

  /** Real packets, protected or not, with some bytes changed, cut or with more behind them. */
  const samples = [
    ...ipv4,
    ...ipv6,
    ...[tunnel, { ...tunnel, tunnel: v6 }, { ...tunnel, udpEncap: {} }, { ...transport, spi: 0x3000 }].flatMap((sa) => {
      folder = mkdtempSync(join(tmpdir(), 'vipsec-esp-'));
      const made = packets(esp(capture(ipv4, 101), [sa]).output).map(({ bytes }) => bytesOf(bytes));
      rmSync(folder, { recursive: true });
      return made;
    }),
  ];
  const packet = fc.oneof(
    fc.uint8Array({ maxLength: 120 }),
    fc
      .record({
        sample: fc.constantFrom(...samples),
        changes: fc.array(fc.tuple(fc.nat(80), fc.nat(255)), { maxLength: 4 }),
        length: fc.nat(400),
      })
      .map(({ sample, changes, length }) => {
        const bytes = new Uint8Array(length < 100 ? length : sample.length + (length > 350 ? length - 350 : 0));
        bytes.set(sample.subarray(0, bytes.length));
        for (const [at, value] of changes) if (at < bytes.length) bytes[at] = value;
        return bytes;
      }),
  );

  test.each([1, 101])('every packet is written, dropped or removed, and nothing throws (link type %i)', (linkType) => {
    fc.assert(
      fc.property(fc.array(packet, { minLength: 1, maxLength: 80 }), (frames) => {
        const path = capture(
          linkType === 1
            ? frames.map((frame) =>
                Uint8Array.from([
                  ...new Uint8Array(12),
                  frame[0] >> 4 === 6 ? 0x86 : 8,
                  frame[0] >> 4 === 6 ? 0xdd : 0,
                  ...frame,
                ]),
              )
            : frames,
          linkType,
        );
        const { report, output } = esp(path, all);
        expect(report.in).toBe(frames.length);
        expect(report.out + total(report) + report.dummy).toBe(report.in);
        expect(report.out).toBe(report.protected + report.verified + report.bypassed - dropped(report, 'link-type'));
        expect(packets(output).length).toBe(report.out);
      }),
      { numRuns: runs(60) },
    );
  });
});
