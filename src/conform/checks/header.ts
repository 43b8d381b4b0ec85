/** Packets that are received, and their `struct virtio_net_hdr` (Virtio 1.4, 5.1.9.3.2, 5.1.9.4.1, 5.1.4.1). */
import { Ethernet, Udp } from '../../packet/fields.ts';
import { Feature } from '../../virtio/features.ts';
import { NetConfigField } from '../../virtio-net/config.ts';
import { NetHeaderFlag as Flag, GsoType } from '../../virtio-net/header.ts';
import type { Bench, UpOptions } from '../bench.ts';
import { type Check, expect, hex, must, need, should, Untestable, untried } from '../check.ts';
import type { Driver, Received } from '../driver.ts';
import { checksumFrom, get16, hasRightChecksum, isEqual, put16, udpFrame } from '../frames.ts';
import type { Network } from '../network.ts';

import { expectUsedTogether } from './framing.ts';
import { Raw, TUNNEL_BITS, UDP, unusedFields } from './header-fields.ts';

const BUFFERS = '5.1.9.3.2';
const RECEIVED = '5.1.9.4.1';
const NET = '5.1.4.1';

const SECURITY_FLAGS = Flag.SECURITY | Flag.SECURITY_ERR | Flag.SECURITY_SA_SOFT_EXPIRY_WARN;
const GUEST_TSO = [Feature.GUEST_TSO4, Feature.GUEST_TSO6, Feature.GUEST_UFO, Feature.GUEST_USO4, Feature.GUEST_USO6];

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

export const receivedChecks: readonly Check[] = [
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
  must('HDR-018', RECEIVED, 'All buffers of a packet are used together', ['rx-buffers-apart'], (bench) =>
    expectUsedTogether(bench, {}),
  ),
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
      const received = await network.arrivedAfterAll();
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
        const received = await (size > mtu ? network.arrivedAfterAll() : network.arrived());
        bench.log(`a packet of ${size} bytes, mtu ${mtu}: ${received === null ? 'not passed' : 'passed'}`);
        expect(
          (received !== null) === size <= mtu,
          `a packet of ${size} bytes was ${received === null ? 'not ' : ''}passed, mtu is ${mtu}`,
        );
      }
    },
  ),
  untried(
    'HDR-040',
    RECEIVED,
    'MUST',
    'With RSC_EXT, coalesced packets have RSC_INFO, and their numbers of segments and of duplicate ACKs',
    'a driver cannot make a device coalesce segments',
  ),
  untried(
    'HDR-041',
    RECEIVED,
    'MUST',
    'With GUEST_UDP_TUNNEL_GSO_CSUM, the outer UDP checksum is the pseudo header with UDP_TUNNEL_CSUM, and else right or 0',
    'a driver cannot make a device pass packets for segmentation',
  ),
  untried(
    'HDR-042',
    RECEIVED,
    'MUST',
    'With GUEST_ECN, packets for segmentation that have the ECN bit have it in gso_type',
    'a driver cannot make a device pass packets for segmentation',
  ),
];
