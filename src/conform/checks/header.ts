/** Packets that are sent and received, and `struct virtio_net_hdr` (Virtio 1.4, 5.1.9.2.2, 5.1.9.3.2, 5.1.9.4.1, 5.1.4.1). */
import { Ethernet, Ipv4, Udp } from '../../packet/fields.ts';
import { ResourceType as R } from '../../virtio/admin-wire.ts';
import { Feature } from '../../virtio/features.ts';
import { NetConfigField } from '../../virtio-net/config.ts';
import { NetHeaderFlag as Flag, GsoType, type NetHeader } from '../../virtio-net/header.ts';
import type { Bench, UpOptions } from '../bench.ts';
import { type Check, expect, hex, must, need, should, Untestable, untried } from '../check.ts';
import type { Driver, Received } from '../driver.ts';
import { checksumFrom, get16, hasRightChecksum, isEqual, protocolOf, put16, udpFrame } from '../frames.ts';
import type { Network } from '../network.ts';
import { offeredCapabilities, succeeded } from '../offer.ts';
import { anySa, saBytes } from '../samples.ts';

const SENT = '5.1.9.2.2';
const BUFFERS = '5.1.9.3.2';
const RECEIVED = '5.1.9.4.1';
const NET = '5.1.4.1';

const UNKNOWN_FLAG = 0x80;
/** More than any frame here is long. */
const BEYOND = 0x7000;
const UDP = Ethernet.length + Ipv4.minLength;
/** Fields of the longest header, whether they were negotiated or not (5.1.9). */
const Raw = { outerTh: 20, innerNh: 22, outerNh: 24 } as const;
const SECURITY_FLAGS = Flag.SECURITY | Flag.SECURITY_ERR | Flag.SECURITY_SA_SOFT_EXPIRY_WARN;
const HOST_TSO = [Feature.HOST_TSO4, Feature.HOST_TSO6, Feature.HOST_USO, Feature.HOST_UFO];
const GUEST_TSO = [Feature.GUEST_TSO4, Feature.GUEST_TSO6, Feature.GUEST_UFO, Feature.GUEST_USO4, Feature.GUEST_USO6];

/** A packet with header fields that are to be ignored leaves as any other. */
async function expectSent(
  network: Network,
  what: string,
  header: Partial<NetHeader>,
  raw: readonly (readonly [number, number])[] = [],
  frame = udpFrame(network.outward),
): Promise<void> {
  await network.send(frame, header, { raw });
  const came = await network.departure(`a packet with ${what}`);
  expect(isEqual(came, frame), `a packet with ${what} was sent with other bytes`);
}

/** A packet that the device must not accept does not leave, one after it does. */
async function expectRefused(bench: Bench, what: string, header: Partial<NetHeader>): Promise<void> {
  const { network } = await bench.network();
  const refused = udpFrame(network.outward);
  await network.send(refused, header);
  const next = udpFrame(network.outward);
  await network.send(next);
  for (;;) {
    const came = await network.departure('the packet after it');
    expect(!isEqual(came, refused), `a packet with ${what} was sent`);
    if (isEqual(came, next)) break;
  }
  bench.log(`a packet with ${what} was not sent, the next one was`);
}

/** A packet as the device receives it. */
async function receive(
  bench: Bench,
  options: UpOptions = {},
): Promise<{ received: Received; sent: Uint8Array; driver: Driver; network: Network }> {
  const { driver, network } = await bench.network(options);
  const sent = udpFrame(network.inward);
  await network.inject(sent);
  const received = await network.arrival('the packet');
  const { flags, gsoType, numBuffers } = received.header;
  bench.log(
    `received: flags ${hex(flags)}, gso_type ${gsoType}, num_buffers ${numBuffers}, buffers of ${received.lengths.join(' + ')} bytes`,
  );
  return { received, sent, driver, network };
}

/** Without `features`, gso_type must not be `type`. */
function neverGso(
  id: Check['id'],
  features: readonly number[],
  type: number,
  name: string,
  fault: string,
  without: string,
): Check {
  return must(id, RECEIVED, `Without ${without}, gso_type is not ${name}`, [fault], async (bench) => {
    // The bare driver negotiates none of these.
    const { received, driver } = await receive(bench);
    need(!driver.features.hasAny(...features), 'the feature is negotiated');
    const { gsoType } = received.header;
    const is = type === TUNNEL_BITS ? (gsoType & TUNNEL_BITS) !== 0 : (gsoType & ~(TUNNEL_BITS | GsoType.ECN)) === type;
    expect(!is, `gso_type is ${hex(gsoType)}`);
  });
}

const TUNNEL_BITS = GsoType.UDP_TUNNEL_IPV4 | GsoType.UDP_TUNNEL_IPV6;

/** A frame over several small receive buffers. */
async function spread(bench: Bench): Promise<{ received: Received; driver: Driver; size: number; length: number }> {
  const size = 256;
  const { driver, network } = await bench.network({ features: [Feature.MRG_RXBUF], rx: { count: 16, size } });
  const sent = udpFrame({ ...network.inward, length: 1000 });
  await network.inject(sent);
  const received = await network.arrival('the packet');
  bench.log(`num_buffers ${received.header.numBuffers}, buffers of ${received.lengths.join(' + ')} bytes of ${size}`);
  expect(isEqual(received.frame, sent), 'the packet has other bytes');
  return { received, driver, size, length: driver.layout.length + sent.length };
}

/** The layout has the fields of OUT_NET_HEADER and UDP tunnels, though the features are not negotiated. */
async function unusedFields(bench: Bench): Promise<{ driver: Driver; network: Network }> {
  const up = await bench.network({ ipsec: true });
  need(up.driver.layout.length >= Raw.outerNh + 2, 'the header has no such field');
  return up;
}

export const headerChecks: readonly Check[] = [
  must(
    'HDR-001',
    SENT,
    'Flags that the device does not know are ignored',
    ['tx-unknown-flag-dropped'],
    async (bench) => {
      const { network, driver } = await bench.network();
      await expectSent(network, `flag ${hex(UNKNOWN_FLAG)}`, {}, [[0, UNKNOWN_FLAG]]);
      bench.log(`sent with flag ${hex(UNKNOWN_FLAG)}, header of ${driver.layout.length} bytes`);
    },
  ),
  must(
    'HDR-002',
    SENT,
    'Without NEEDS_CSUM, csum_start and csum_offset are not used',
    ['tx-csum-always'],
    async (bench) => {
      const { network } = await bench.network();
      const frame = udpFrame({ ...network.outward, checksum: 'wrong' });
      await expectSent(network, 'csum_start and csum_offset', { csumStart: UDP, csumOffset: Udp.checksum }, [], frame);
      bench.log('sent as it was');
    },
  ),
  must('HDR-003', SENT, 'Without OUT_NET_HEADER, outer_nh_offset is not used', ['tx-outer-nh-used'], async (bench) => {
    const { network } = await unusedFields(bench);
    await expectSent(network, `outer_nh_offset ${BEYOND}`, {}, [[Raw.outerNh, BEYOND]]);
    bench.log('sent as it was');
  }),
  must('HDR-004', SENT, 'With segmentation, hdr_len is not relied on', ['tx-hdr-len-trusted'], async (bench) => {
    const tso = HOST_TSO.filter((bit) => bench.offered().has(bit)).slice(0, 1);
    need(tso.length > 0, 'the device offers no segmentation');
    const { network } = await bench.network({ features: [Feature.CSUM, ...tso] });
    await expectSent(network, `hdr_len ${BEYOND}`, { hdrLen: BEYOND });
    await expectSent(network, 'hdr_len 1', { hdrLen: 1 });
    bench.log('sent with a hdr_len beyond the packet, and with one inside its first header');
  }),
  must('HDR-005', SENT, 'A packet with both UDP tunnel bits in gso_type is not accepted', ['tx-gso-ignored'], (bench) =>
    expectRefused(bench, 'both UDP tunnel bits', {
      flags: Flag.NEEDS_CSUM,
      gsoType: TUNNEL_BITS | GsoType.TCPV4,
      gsoSize: 64,
      csumStart: UDP,
      csumOffset: Udp.checksum,
    }),
  ),
  must(
    'HDR-006',
    SENT,
    'Without UDP tunnel bits, outer_th_offset and inner_nh_offset are not used',
    ['tx-tunnel-offsets-used'],
    async (bench) => {
      const { network } = await unusedFields(bench);
      await expectSent(network, 'tunnel offsets', {}, [
        [Raw.outerTh, BEYOND],
        [Raw.innerNh, BEYOND],
      ]);
      bench.log('sent as it was');
    },
  ),
  must(
    'HDR-007',
    SENT,
    'A packet with a UDP tunnel bit and without NEEDS_CSUM is not accepted',
    ['tx-gso-ignored'],
    (bench) =>
      expectRefused(bench, 'a UDP tunnel bit and without NEEDS_CSUM', {
        gsoType: GsoType.UDP_TUNNEL_IPV4 | GsoType.TCPV4,
        gsoSize: 64,
      }),
  ),
  must('HDR-008', SENT, 'A packet with a UDP tunnel bit and DATA_VALID is not accepted', ['tx-gso-ignored'], (bench) =>
    expectRefused(bench, 'a UDP tunnel bit and DATA_VALID', {
      flags: Flag.NEEDS_CSUM | Flag.DATA_VALID,
      gsoType: GsoType.UDP_TUNNEL_IPV4 | GsoType.TCPV4,
      gsoSize: 64,
      csumStart: UDP,
      csumOffset: Udp.checksum,
    }),
  ),
  must(
    'HDR-009',
    SENT,
    'A packet with a UDP tunnel bit and no inner type is not accepted',
    ['tx-gso-ignored'],
    (bench) =>
      expectRefused(bench, 'a UDP tunnel bit and inner type NONE', {
        flags: Flag.NEEDS_CSUM,
        gsoType: GsoType.UDP_TUNNEL_IPV4,
        gsoSize: 64,
        csumStart: UDP,
        csumOffset: Udp.checksum,
      }),
  ),
  must(
    'HDR-010',
    SENT,
    'A packet with UDP_TUNNEL_CSUM and without UDP tunnel bits is not accepted',
    ['tx-gso-ignored'],
    async (bench) => {
      need(bench.profile.revision === 'virtio-1.4', 'the draft has another meaning for this flag');
      await expectRefused(bench, 'UDP_TUNNEL_CSUM and no tunnel', { flags: Flag.UDP_TUNNEL_CSUM });
    },
  ),
  must(
    'HDR-011',
    SENT,
    'Without NEEDS_CSUM, the device does not rely on the checksum of a packet',
    ['tx-bad-checksum-dropped'],
    async (bench) => {
      const { network } = await bench.network();
      const frame = udpFrame({ ...network.outward, checksum: 'wrong' });
      await expectSent(network, 'a wrong checksum', {}, [], frame);
      bench.log('a packet with a wrong checksum was sent as it was');
    },
  ),
  must(
    'HDR-012',
    SENT,
    'Without SECURITY, resource_id and resource_type are not used',
    ['tx-resource-used'],
    async (bench) => {
      const { driver, network } = await bench.network({ ipsec: true });
      const admin = bench.console(driver);
      const sa = anySa(await offeredCapabilities(admin), 'outbound');
      succeeded(await admin.create(R.NET_IPSEC_OUTB_SA, 0, saBytes(admin.revision, sa, 0)));
      await expectSent(network, 'a resource and no SECURITY', { resourceId: 0, resourceType: R.NET_IPSEC_OUTB_SA });
      await expectSent(network, 'an unknown resource and no SECURITY', { resourceId: 0xfffff, resourceType: 0x999 });
      bench.log('sent in the clear');
    },
  ),
  must(
    'HDR-013',
    BUFFERS,
    'num_buffers is the number of buffers that hold the packet',
    ['rx-buffers-zero'],
    async (bench) => {
      const { received } = await receive(bench, { wanted: [Feature.MRG_RXBUF] });
      expect(
        received.header.numBuffers === 1,
        `num_buffers is ${received.header.numBuffers} of a packet in one buffer`,
      );
    },
  ),
  must('HDR-014', BUFFERS, 'Without MRG_RXBUF, a packet is in a single buffer', ['rx-buffers-two'], async (bench) => {
    const { received, sent } = await receive(bench);
    expect(
      received.lengths.length === 1 && isEqual(received.frame, sent),
      `the packet came in ${received.lengths.length} buffers`,
    );
  }),
  must('HDR-015', RECEIVED, 'Without MRG_RXBUF, num_buffers is 1', ['rx-buffers-zero'], async (bench) => {
    const { received } = await receive(bench);
    expect(received.header.numBuffers === 1, `num_buffers is ${received.header.numBuffers}`);
  }),
  must(
    'HDR-016',
    RECEIVED,
    'With MRG_RXBUF, num_buffers is the number of buffers that the packet is spread over',
    ['rx-buffers-zero', 'rx-buffers-two'],
    async (bench) => {
      const { received, size, length } = await spread(bench);
      const needed = Math.ceil(length / size);
      expect(
        received.header.numBuffers === needed,
        `num_buffers is ${received.header.numBuffers}, a packet of ${length} bytes needs ${needed} buffers of ${size}`,
      );
    },
  ),
  must(
    'HDR-017',
    RECEIVED,
    'All buffers of a packet but the last are used completely',
    ['used-length-short'],
    async (bench) => {
      const { received, size } = await spread(bench);
      const partial = received.lengths.slice(0, -1).findIndex((length) => length !== size);
      expect(
        partial < 0,
        `buffer ${partial} of ${received.lengths.length} has ${received.lengths[partial]} of ${size} bytes`,
      );
    },
  ),
  must('HDR-018', RECEIVED, 'All buffers of a packet are used together', ['rx-buffers-apart'], async (bench) => {
    const size = 256;
    const { driver, network } = await bench.network({ features: [Feature.MRG_RXBUF], rx: { count: 16, size } });
    const ring = driver.ring(0);
    const length = 1000;
    const needed = Math.ceil((driver.layout.length + length) / size);
    await network.inject(udpFrame({ ...network.inward, length }));
    await bench.eventually(() => ring.pending > 0, 'the packet did not arrive');
    const seen = ring.pending;
    bench.log(`${seen} buffers used at once for a packet that needs ${needed}`);
    expect(seen >= needed, `only ${seen} of ${needed} buffers were used when the first one was`);
  }),
  must(
    'HDR-019',
    RECEIVED,
    'Without GUEST_CSUM, flags is zero (but for those of IPsec)',
    ['rx-data-valid', 'rx-needs-csum'],
    async (bench) => {
      const { received } = await receive(bench);
      const flags = received.header.flags & ~SECURITY_FLAGS;
      expect(flags === 0, `flags is ${hex(received.header.flags)}`);
    },
  ),
  should('HDR-020', RECEIVED, 'Without GUEST_CSUM, packets are fully checksummed', ['tx-csum-never'], async (bench) => {
    const { network } = await bench.network({ features: [Feature.CSUM] });
    need(network.kind === 'loopback', 'needs a driver at the other end that leaves checksums to the device');
    const frame = udpFrame({ ...network.inward, checksum: 'partial' });
    await network.inject(frame, { header: { flags: Flag.NEEDS_CSUM, csumStart: UDP, csumOffset: Udp.checksum } });
    const received = await network.arrival('the packet');
    expect(
      hasRightChecksum(received.frame),
      `the UDP checksum ${hex(get16(received.frame, UDP + Udp.checksum))} is wrong`,
    );
    bench.log('a packet that was sent with a partial checksum arrived with a full one');
  }),
  neverGso('HDR-021', [Feature.GUEST_TSO4], GsoType.TCPV4, 'TCPV4', 'rx-gso-tcpv4', 'GUEST_TSO4'),
  neverGso('HDR-022', [Feature.GUEST_UFO], GsoType.UDP, 'UDP', 'rx-gso-udp', 'GUEST_UFO'),
  neverGso('HDR-023', [Feature.GUEST_TSO6], GsoType.TCPV6, 'TCPV6', 'rx-gso-tcpv6', 'GUEST_TSO6'),
  neverGso(
    'HDR-024',
    [Feature.GUEST_USO4, Feature.GUEST_USO6],
    GsoType.UDP_L4,
    'UDP_L4',
    'rx-gso-udp-l4',
    'GUEST_USO4 and GUEST_USO6',
  ),
  neverGso(
    'HDR-025',
    [Feature.GUEST_UDP_TUNNEL_GSO],
    TUNNEL_BITS,
    'a UDP tunnel',
    'rx-gso-tunnel',
    'GUEST_UDP_TUNNEL_GSO',
  ),
  must(
    'HDR-026',
    RECEIVED,
    'Without GUEST_UDP_TUNNEL_GSO_CSUM, UDP_TUNNEL_CSUM is not set',
    ['rx-tunnel-csum'],
    async (bench) => {
      need(bench.profile.revision === 'virtio-1.4', 'the draft has another meaning for this flag');
      const { received } = await receive(bench);
      expect((received.header.flags & Flag.UDP_TUNNEL_CSUM) === 0, `flags is ${hex(received.header.flags)}`);
    },
  ),
  should(
    'HDR-027',
    RECEIVED,
    'Without GUEST_ECN, no packet for segmentation has the ECN bit',
    ['rx-gso-ecn'],
    async (bench) => {
      const { received } = await receive(bench);
      expect((received.header.gsoType & GsoType.ECN) === 0, `gso_type is ${hex(received.header.gsoType)}`);
    },
  ),
  must('HDR-028', RECEIVED, 'Without OUT_NET_HEADER, outer_nh_offset is not set', ['rx-outer-nh'], async (bench) => {
    const { driver, network } = await unusedFields(bench);
    await network.inject(udpFrame(network.inward));
    const { bytes } = await network.arrival('the packet');
    const offset = bytes[Raw.outerNh] | (bytes[Raw.outerNh + 1] << 8);
    bench.log(`outer_nh_offset ${offset} in a header of ${driver.layout.length} bytes`);
    expect(offset === 0, `outer_nh_offset is ${offset}`);
  }),
  must(
    'HDR-029',
    RECEIVED,
    'With NEEDS_CSUM, csum_start and csum_offset lead to a fully checksummed packet',
    ['rx-needs-csum'],
    async (bench) => {
      const { network } = await bench.network({ features: [Feature.GUEST_CSUM], wanted: [Feature.CSUM] });
      const partial = network.kind === 'loopback' && bench.offered().has(Feature.CSUM);
      const sent = udpFrame({ ...network.inward, checksum: partial ? 'partial' : 'full' });
      const header = { flags: Flag.NEEDS_CSUM, csumStart: UDP, csumOffset: Udp.checksum };
      await network.inject(sent, partial ? { header } : {});
      if (partial) put16(sent, UDP + Udp.checksum, checksumFrom(sent, UDP) || 0xffff);
      const received = await network.arrival('the packet');
      const { flags, csumStart, csumOffset } = received.header;
      bench.log(`flags ${hex(flags)}, csum_start ${csumStart}, csum_offset ${csumOffset}`);
      need((flags & Flag.NEEDS_CSUM) !== 0, 'the device did not set NEEDS_CSUM');
      const frame = received.frame.slice();
      const at = csumStart + csumOffset;
      expect(csumStart < frame.length && at + 2 <= frame.length, 'csum_start and csum_offset lead out of the packet');
      put16(frame, at, checksumFrom(frame, csumStart) || 0xffff);
      expect(isEqual(frame, sent), 'the packet is not what was sent after its checksum was filled in');
    },
  ),
  must(
    'HDR-030',
    RECEIVED,
    'DATA_VALID is set only for packets whose checksum was validated',
    ['rx-data-valid'],
    async (bench) => {
      const { network } = await bench.network({ features: [Feature.GUEST_CSUM] });
      await network.inject(udpFrame({ ...network.inward, checksum: 'wrong' }));
      const received = await network.arrived(bench.patience.quiet);
      const flags = received?.header.flags ?? 0;
      bench.log(
        received === null
          ? 'a packet with a wrong checksum was dropped'
          : `a packet with a wrong checksum arrived with flags ${hex(flags)}`,
      );
      expect((flags & Flag.DATA_VALID) === 0, 'DATA_VALID is set for a packet with a wrong checksum');
    },
  ),
  must(
    'HDR-031',
    RECEIVED,
    'Without any feature for it, gso_type is NONE',
    ['rx-gso-tcpv4', 'rx-gso-udp-l4'],
    async (bench) => {
      const { received } = await receive(bench);
      expect(received.header.gsoType === GsoType.NONE, `gso_type is ${hex(received.header.gsoType)}`);
    },
  ),
  must(
    'HDR-032',
    RECEIVED,
    'A packet whose gso_type is not NONE has NEEDS_CSUM and gso_size',
    ['rx-gso-tcpv4'],
    async (bench) => {
      const { received } = await receive(bench, { wanted: [Feature.GUEST_CSUM, ...GUEST_TSO] });
      const { flags, gsoType, gsoSize } = received.header;
      need(gsoType !== GsoType.NONE, 'the device made no packet for segmentation');
      expect(
        (flags & Flag.NEEDS_CSUM) !== 0 && gsoSize > 0,
        `gso_type is ${hex(gsoType)}, flags ${hex(flags)}, gso_size ${gsoSize}`,
      );
    },
  ),
  must('HDR-033', RECEIVED, 'Without RSC_EXT, RSC_INFO is not set', ['rx-rsc-info'], async (bench) => {
    const { received } = await receive(bench, { wanted: [Feature.GUEST_CSUM] });
    expect((received.header.flags & Flag.RSC_INFO) === 0, `flags is ${hex(received.header.flags)}`);
  }),
  must(
    'HDR-034',
    RECEIVED,
    'A packet with a UDP tunnel in gso_type does not have DATA_VALID',
    ['rx-gso-tunnel+rx-data-valid'],
    async (bench) => {
      const { received } = await receive(bench, { wanted: [Feature.GUEST_CSUM, ...GUEST_TSO] });
      const { flags, gsoType } = received.header;
      need((gsoType & TUNNEL_BITS) !== 0, 'the device made no packet with a UDP tunnel');
      expect((flags & Flag.DATA_VALID) === 0, `gso_type is ${hex(gsoType)}, flags ${hex(flags)}`);
    },
  ),
  should(
    'HDR-035',
    RECEIVED,
    'With receive offloads, hdr_len is not less than the headers',
    ['guest-tso-silent'],
    async (bench) => {
      const offered = GUEST_TSO.filter((bit) => bench.offered().has(bit));
      need(offered.length > 0, 'the device has no receive offloads');
      const { received } = await receive(bench, { features: [Feature.GUEST_CSUM, ...offered] });
      const headers = UDP + Udp.length;
      expect(
        received.header.hdrLen >= headers,
        `hdr_len is ${received.header.hdrLen}, the headers have ${headers} bytes`,
      );
    },
  ),
  untried(
    'HDR-036',
    RECEIVED,
    'MUST',
    'Packets for segmentation in a UDP tunnel have the offsets and checksums of the tunnel',
    'what a device coalesces is its own choice',
  ),
  must(
    'HDR-037',
    RECEIVED,
    'SECURITY and SECURITY_ERR are clear for a packet that did not go through IPsec',
    ['rx-security-lie', 'rx-error-lie'],
    async (bench) => {
      const { network } = await bench.network({ ipsec: true });
      await network.inject(udpFrame(network.inward));
      const { header } = await network.arrival('the packet');
      bench.log(`flags ${hex(header.flags)}`);
      expect(
        (header.flags & (Flag.SECURITY | Flag.SECURITY_ERR)) === 0,
        `flags is ${hex(header.flags)} for a packet in the clear`,
      );
    },
  ),
  must(
    'HDR-038',
    NET,
    'With MTU, received packets of more than mtu bytes are not passed',
    ['rx-mtu-ignored'],
    async (bench) => {
      if (bench.peer === null) throw new Untestable('needs a peer function (--peer) that may send longer packets');
      bench.needFeatures(Feature.MTU);
      const mtu = bench.target.structures.device.read16(NetConfigField.mtu);
      const { network } = await bench.network({ features: [Feature.MTU] });
      const sizes = [mtu, mtu + 1];
      for (const size of sizes) {
        const length = Ethernet.length + size;
        await network.inject(udpFrame({ ...network.inward, length }));
        const received = await network.arrived(size > mtu ? bench.patience.quiet : undefined);
        bench.log(`a packet of ${size} bytes, mtu ${mtu}: ${received === null ? 'not passed' : 'passed'}`);
        expect(
          (received !== null) === size <= mtu,
          `a packet of ${size} bytes was ${received === null ? 'not ' : ''}passed, mtu is ${mtu}`,
        );
      }
    },
  ),
  must(
    'HDR-039',
    NET,
    'With MTU, packets of up to mtu bytes are sent without fragmentation',
    ['tx-long-dropped'],
    async (bench) => {
      bench.needFeatures(Feature.MTU);
      const mtu = bench.target.structures.device.read16(NetConfigField.mtu);
      const { network } = await bench.network({ features: [Feature.MTU] });
      const frame = udpFrame({ ...network.outward, length: Math.min(Ethernet.length + mtu, 3900) });
      await network.send(frame);
      const came = await network.departure(`a packet of ${frame.length - Ethernet.length} bytes`);
      expect(isEqual(came, frame) && protocolOf(came) >= 0, 'the packet was sent with other bytes');
      bench.log(`a packet of ${frame.length - Ethernet.length} bytes was sent, mtu ${mtu}`);
    },
  ),
];
