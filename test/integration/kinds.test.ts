import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Nic, type SaHandle, type SecurityAssociationInput, WIRE_REVISIONS } from '../../src/index.ts';
import { capture, cleanUp, fixChecksum, freshKey, openPair, type Pair, receive, saPair, send } from './support.ts';

afterAll(cleanUp);

const ip = capture('http-ipv4').filter((frame) => frame.readUInt16BE(12) === 0x0800);
const ip6 = capture('dns-ipv6').filter((frame) => frame.readUInt16BE(12) === 0x86dd && frame[14 + 6] !== 58);

type Change = Partial<SecurityAssociationInput>;

const random = (length: number) => Buffer.from(crypto.getRandomValues(new Uint8Array(length))).toString('hex');
const salt = '01020304';

/** Every AEAD of the standard's table, with each key length. */
const aeads: [string, () => Change][] = [
  ...[16, 24, 32].flatMap((bytes): [string, () => Change][] => [
    [`AES-${8 * bytes}-GCM`, () => ({ aead: { name: 'aes-gcm', key: freshKey(bytes), salt } })],
    [`AES-${8 * bytes}-CCM`, () => ({ aead: { name: 'aes-ccm', key: freshKey(bytes), salt: '010203' } })],
    [`AES-${8 * bytes}-GMAC`, () => ({ aead: { name: 'aes-gmac', key: freshKey(bytes), salt } })],
  ]),
  ['ChaCha20-Poly1305', () => ({ aead: { name: 'chacha20-poly1305', key: freshKey(32), salt } })],
];

const ciphers: [string, () => NonNullable<Change['cipher']>][] = [
  ['NULL', () => ({ name: 'null' })],
  ['3DES-CBC', () => ({ name: '3des-cbc', key: random(24) })],
  ...[16, 24, 32].flatMap((bytes): [string, () => NonNullable<Change['cipher']>][] => [
    [`AES-${8 * bytes}-CBC`, () => ({ name: 'aes-cbc', key: freshKey(bytes) })],
    [`AES-${8 * bytes}-CTR`, () => ({ name: 'aes-ctr', key: freshKey(bytes), salt })],
  ]),
];

/** Every MAC of the table whose key fits an SA object. */
const macs: [string, () => NonNullable<Change['auth']>][] = [
  ['HMAC-SHA1', () => ({ name: 'hmac-sha1', key: freshKey(20) })],
  ['HMAC-SHA-256', () => ({ name: 'hmac-sha256', key: freshKey(32) })],
  ['AES-XCBC', () => ({ name: 'aes-xcbc', key: freshKey(16) })],
  ['AES-CMAC', () => ({ name: 'aes-cmac', key: freshKey(16) })],
];

const pairs = ciphers.flatMap(([cipherName, cipher]) =>
  macs.map(([macName, mac]): [string, () => Change] => [
    `${cipherName} with ${macName}`,
    () => ({ cipher: cipher(), auth: mac() }),
  ]),
);

const esn = { esn: true };
const tunnelOptions = { copyDscp: true, copyDf: true, decrementTtl: true, ecn: true };

/** What runs inline on one side and in software on the other, in both directions and IP versions. */
const kinds: [string, () => Change][] = [
  ...[...aeads, ...pairs].map(([name, change], i): [string, () => Change] => {
    // Half of them in each ESP mode, and half of those with ESN.
    const mode = i % 2 === 0 ? 'tunnel' : 'transport';
    const options = i % 4 < 2 ? {} : { options: esn };
    return [`ESP ${mode}, ${name}${i % 4 < 2 ? '' : ', ESN'}`, () => ({ ...change(), mode, ...options })];
  }),
  ...[...macs, ['AES-GMAC', () => ({ name: 'aes-gmac', key: freshKey(16), salt })] as (typeof macs)[number]].flatMap(
    ([name, mac]): [string, () => Change][] => [
      [`AH tunnel, ${name}`, () => ({ protocol: 'ah', auth: mac() })],
      [`AH transport, ${name}, ESN`, () => ({ protocol: 'ah', mode: 'transport', auth: mac(), options: esn })],
    ],
  ),
  ['ESP tunnel in UDP', () => ({ udpEncap: {} })],
  [
    'ESP tunnel in UDP of other ports, ESN',
    () => ({ udpEncap: { sourcePort: 50000, destinationPort: 4501 }, options: esn }),
  ],
  ['ESP transport in UDP', () => ({ mode: 'transport', udpEncap: {} })],
  ['ESP tunnel without a replay window', () => ({ replayWindow: 0 })],
  ['ESP tunnel with a replay window of 65536', () => ({ replayWindow: 65536 })],
];

/** Sends `frames` under `out`; the other side has to get them as they were, secured by `inn`. */
async function expectThrough(
  [from, out]: [Nic, SaHandle],
  [to, inn]: [Nic, SaHandle],
  frames: readonly Buffer[],
  changed = (frame: Buffer) => frame,
): Promise<void> {
  const [, received] = await Promise.all([send(from, frames, out), receive(to, frames.length, 5)]);
  expect(received.map(({ frame }) => frame.toString('hex'))).toEqual(
    frames.map((frame) => changed(frame).toString('hex')),
  );
  expect(received.every(({ sa }) => sa === inn.handle)).toBe(true);
}

describe.each(WIRE_REVISIONS)('SAs of every kind, by %s,', (revision) => {
  let pair: Pair;
  beforeAll(async () => {
    pair = await openPair({ wire: revision }, { ipsec: false });
  });

  it.each(kinds)('carry traffic from inline to software and back: %s', async (_name, change) => {
    const { a, b, wire } = pair;
    for (const [frames, ipv6] of [
      [ip.slice(0, 8), false],
      [ip6.slice(0, 8), true],
    ] as const) {
      const forth = saPair(change(), ipv6);
      const back = saPair(change(), ipv6);
      const outA = await a.ipsec.addSa(forth.outbound, { require: 'inline' });
      const inB = await b.ipsec.addSa(forth.inbound);
      const outB = await b.ipsec.addSa(back.outbound);
      const inA = await a.ipsec.addSa(back.inbound, { require: 'inline' });
      wire.frames.length = 0;
      await expectThrough([a, outA], [b, inB], frames);
      await expectThrough([b, outB], [a, inA], frames);
      expect(wire.frames).toHaveLength(2 * frames.length);
      expect(wire.frames.every(({ frame }) => !frames.some((clear) => clear.equals(frame)))).toBe(true);
      for (const sa of [outA, inB, outB, inA]) await sa.remove();
    }
  });

  it('have the tunnel header that they ask for, of both IP versions', async () => {
    const { a, b, wire } = pair;
    const v4 = saPair({ tunnel: { source: '198.51.100.1', destination: '198.51.100.2', ttl: 7, dscp: 46, df: true } });
    const v6 = saPair(
      { tunnel: { source: '2001:db8::11', destination: '2001:db8::12', hopLimit: 9, dscp: 10, flowLabel: 0xabcde } },
      true,
    );
    for (const { outbound, inbound } of [v4, v6]) {
      const out = await a.ipsec.addSa(outbound, { require: 'inline' });
      const inn = await b.ipsec.addSa(inbound);
      wire.frames.length = 0;
      await expectThrough([a, out], [b, inn], ip.slice(0, 2));
      const outer = wire.frames[0].frame.subarray(14);
      if (outbound === v4.outbound) {
        expect([outer[8], outer[1], outer[6]]).toEqual([7, 46 << 2, 0x40]);
        expect([...outer.subarray(12, 20)]).toEqual([198, 51, 100, 1, 198, 51, 100, 2]);
      } else {
        expect([outer[7], outer.readUInt32BE(0)]).toEqual([9, 0x6_28_abcde]);
        expect(outer.subarray(8, 40).toString('hex')).toBe(`20010db8${'0'.repeat(22)}1120010db8${'0'.repeat(22)}12`);
      }
      await out.remove();
      await inn.remove();
    }
  });

  it('copy DSCP and DF, lower the TTL and carry ECN when asked, as far as the revision can say so', async () => {
    const { a, b, wire } = pair;
    const frame = Buffer.from(ip[0]);
    frame[14 + 1] = (26 << 2) | 2;
    frame[14 + 6] |= 0x40;
    frame[14 + 8] = 33;
    fixChecksum(frame);
    const { ecn: _, ...draftOptions } = tunnelOptions;
    const options = revision === 'virtio-1.4' ? tunnelOptions : draftOptions;
    const { outbound, inbound } = saPair({ options });
    const out = await a.ipsec.addSa(outbound, { require: 'inline' });
    const inn = await b.ipsec.addSa({ ...inbound, options: { ...options, decrementTtl: false } });
    wire.frames.length = 0;
    const lowered = Buffer.from(frame);
    lowered[14 + 8] = 32;
    fixChecksum(lowered);
    await expectThrough([a, out], [b, inn], [frame], () => lowered);
    const outer = wire.frames[0].frame.subarray(14);
    expect([outer[1], outer[6] & 0x40]).toEqual([(26 << 2) | (revision === 'virtio-1.4' ? 2 : 0), 0x40]);
    await out.remove();
    await inn.remove();
    if (revision === 'virtio-1.4') return;
    const refused = a.ipsec.addSa(saPair({ options: tunnelOptions }).outbound, { require: 'inline' });
    await expect(refused).rejects.toThrow(/does not offer ECN/);
  });

  it('are described by the device as they were made, without their keys, and changed', async () => {
    const { a } = pair;
    const { outbound, inbound } = saPair({ options: esn, replayWindow: 128 });
    const out = await a.ipsec.addSa(outbound, { require: 'inline' });
    const inn = await a.ipsec.addSa(inbound, { require: 'inline' });
    const kept = await inn.query();
    expect(kept).toMatchObject({ mode: 1, direction: 2, spi: inn.spi, options: 1n, replayWindow: 128 });
    expect(kept).toMatchObject({ cipherAlgorithm: 1n, cipherKeyLength: 16, authKeyLength: 0 });
    const key = String(outbound.aead?.key);
    for (const sa of [out, inn]) {
      const said = `${JSON.stringify(await sa.query(), (_, value) => (typeof value === 'bigint' ? `${value}` : value))}`;
      expect(said).not.toMatch(/cipherKey"|authKey"|salt/);
      expect(said.includes(key)).toBe(false);
    }
    await inn.modify({ ...inbound, replayWindow: 1024 });
    expect(await inn.query()).toMatchObject({ replayWindow: 1024, options: 1n });
    await out.remove();
    await inn.remove();
    await expect(inn.query()).rejects.toThrow(expect.objectContaining({ code: 'NO_SUCH_SA' }));
  });

  it('run in software on both sides when the device cannot express them', async () => {
    const { a, b, wire } = pair;
    const { outbound, inbound } = saPair({
      cipher: { name: 'aes-cbc', key: freshKey() },
      auth: { name: 'hmac-sha512', key: freshKey(64) },
    });
    const out = await a.ipsec.addSa(outbound);
    const inn = await b.ipsec.addSa(inbound);
    expect(out.placement).toEqual({ where: 'software', because: 'hmac-sha512 key does not fit the SA object' });
    wire.frames.length = 0;
    await expectThrough([a, out], [b, inn], ip.slice(0, 20));
    expect(wire.frames.every(({ frame }) => frame[14 + 9] === 50)).toBe(true);
    await out.remove();
    await inn.remove();
  });
});
