/** Control commands that say what is received: modes, addresses, VLANs (Virtio 1.4, 5.1.9.5.1 to 5.1.9.5.4). */
import { Feature } from '../../virtio/features.ts';
import { NetConfigField, NetStatus } from '../../virtio-net/config.ts';
import {
  AnnounceCommand,
  ControlClass,
  encodeMacTables,
  MacCommand,
  RxCommand,
  VlanCommand,
} from '../../virtio-net/control-wire.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, must, should, Untestable } from '../check.ts';
import { type Controlled, controlled, delivered, frameTo, Mac } from '../delivery.ts';
import { isEqual } from '../frames.ts';

const MODES = '5.1.9.5.1.1';
const ADDRESSES = '5.1.9.5.2.1';
const VLANS = '5.1.9.5.3.1';
/** VLANs that checks use: one that the driver wants, and another. */
const VLAN = { wanted: 77, other: 78 } as const;

type Mode = keyof typeof RxCommand;

const FEATURES: Readonly<Record<Mode, number>> = {
  PROMISC: Feature.CTRL_RX,
  ALLMULTI: Feature.CTRL_RX,
  ALLUNI: Feature.CTRL_RX_EXTRA,
  NOMULTI: Feature.CTRL_RX_EXTRA,
  NOUNI: Feature.CTRL_RX_EXTRA,
  NOBCAST: Feature.CTRL_RX_EXTRA,
};

/** A device with the receive modes, and these of them on. */
async function withModes(bench: Bench, ...modes: readonly Mode[]): Promise<Controlled> {
  const features = [Feature.CTRL_RX, ...modes.map((mode) => FEATURES[mode])];
  const all = await controlled(bench, { features });
  for (const mode of modes) await setMode(all, mode, 1);
  return all;
}

async function setMode({ control }: Controlled, mode: Mode, on: 0 | 1): Promise<void> {
  await control.done(`RX_${mode} ${on}`, ControlClass.RX, RxCommand[mode], Uint8Array.of(on));
}

/** Modes are turned on and off, without a word about what they do. */
function supports(id: Check['id'], title: string, modes: readonly Mode[]): Check {
  return must(id, MODES, title, ['ctrl-refused'], async (bench) => {
    const features = modes.map((mode) => FEATURES[mode]);
    const driver = await bench.up({ control: true, features });
    const control = bench.control(driver);
    for (const mode of modes) {
      for (const on of [1, 0])
        await control.done(`RX_${mode} ${on}`, ControlClass.RX, RxCommand[mode], Uint8Array.of(on));
    }
  });
}

interface Passing {
  readonly modes: readonly Mode[];
  /** Where the frame goes that is looked at, and whether it is to arrive. */
  readonly to: Uint8Array;
  readonly arrives: boolean;
  /** Where the frame behind it goes, which arrives in any case; default: the device. */
  readonly last?: Uint8Array;
}

/** With `modes` on, frames to `to` arrive, or do not. */
function passes(id: Check['id'], title: string, fault: string, { modes, to, arrives, last }: Passing): Check {
  return should(id, MODES, title, [fault], async (bench) => {
    const all = await withModes(bench, ...modes);
    const destination = isEqual(to, OWN) ? all.network.inward.destination : to;
    const [came] = await delivered(all, [frameTo(all.network, destination)], frameTo(all.network, last));
    const name = Buffer.from(destination).toString('hex');
    bench.log(`with ${modes.join(' and ')} on, a packet to ${name} ${came ? 'arrived' : 'did not arrive'}`);
    expect(came === arrives, `a packet to ${name} ${came ? 'arrived' : 'did not arrive'}`);
  });
}

/** Stands for the address of the device under test. */
const OWN = new Uint8Array(6);

/** Sets the MAC filtering table. */
async function setTable({ control }: Controlled, unicast: Uint8Array[], multicast: Uint8Array[]): Promise<void> {
  const name = `MAC_TABLE_SET with ${unicast.length} + ${multicast.length} addresses`;
  await control.done(name, ControlClass.MAC, MacCommand.TABLE_SET, encodeMacTables(unicast, multicast));
}

/** Whether a frame to a stranger and one to a group arrive. */
async function passesStrangers(all: Controlled): Promise<boolean[]> {
  const frames = [frameTo(all.network, Mac.stranger), frameTo(all.network, Mac.group)];
  return await delivered(all, frames, frameTo(all.network));
}

async function setVlan({ control }: Controlled, command: keyof typeof VlanCommand, id: number): Promise<void> {
  const data = Uint8Array.of(id, id >>> 8);
  await control.done(`VLAN_${command} ${id}`, ControlClass.VLAN, VlanCommand[command], data);
}

/** Whether tagged frames of the wanted and of the other VLAN arrive. */
async function passesVlans(all: Controlled): Promise<boolean[]> {
  const frames = [VLAN.wanted, VLAN.other].map((id) => frameTo(all.network, undefined, id));
  return await delivered(all, frames, frameTo(all.network));
}

export const controlReceiveChecks: readonly Check[] = [
  supports('CTL-001', 'With CTRL_RX, PROMISC is supported', ['PROMISC']),
  passes('CTL-002', 'In promiscuous mode, all packets are received', 'ctrl-ignored', {
    modes: ['PROMISC'],
    to: Mac.stranger,
    arrives: true,
  }),
  passes('CTL-003', 'Promiscuous mode takes effect even if another mode is on', 'rx-promisc-weak', {
    modes: ['NOUNI', 'NOMULTI', 'PROMISC'],
    to: OWN,
    arrives: true,
    last: Mac.all,
  }),
  supports('CTL-004', 'With CTRL_RX, ALLMULTI is supported', ['ALLMULTI']),
  passes('CTL-005', 'With all-multicast on, all multicast packets are received', 'ctrl-ignored', {
    modes: ['ALLMULTI'],
    to: Mac.group,
    arrives: true,
  }),
  supports('CTL-006', 'With CTRL_RX_EXTRA, ALLUNI, NOMULTI, NOUNI and NOBCAST are supported', [
    'ALLUNI',
    'NOMULTI',
    'NOUNI',
    'NOBCAST',
  ]),
  passes('CTL-007', 'With all-unicast on, all unicast packets are received', 'ctrl-ignored', {
    modes: ['ALLUNI'],
    to: Mac.stranger,
    arrives: true,
  }),
  should('CTL-008', MODES, 'With NOMULTI on, no multicast packet is received', ['ctrl-ignored'], async (bench) => {
    const all = await withModes(bench, 'NOMULTI');
    // Without it the group's packets arrive.
    await setTable(all, [], [Mac.group]);
    await setMode(all, 'NOMULTI', 0);
    const [before] = await delivered(all, [frameTo(all.network, Mac.group)], frameTo(all.network));
    await setMode(all, 'NOMULTI', 1);
    const [after] = await delivered(all, [frameTo(all.network, Mac.group)], frameTo(all.network));
    bench.log(`a packet to a group arrived with NOMULTI off: ${before}, on: ${after}`);
    expect(before && !after, `a packet to a group arrived with NOMULTI off: ${before}, on: ${after}`);
  }),
  passes('CTL-009', 'NOMULTI takes effect even if all-multicast is on', 'rx-all-wins', {
    modes: ['ALLMULTI', 'NOMULTI'],
    to: Mac.group,
    arrives: false,
  }),
  passes('CTL-010', 'NOMULTI does not apply to broadcasts', 'rx-nomulti-broadcast', {
    modes: ['NOMULTI'],
    to: Mac.all,
    arrives: true,
  }),
  passes('CTL-011', 'With NOUNI on, no unicast packet is received', 'ctrl-ignored', {
    modes: ['NOUNI'],
    to: OWN,
    arrives: false,
    last: Mac.all,
  }),
  passes('CTL-012', 'NOUNI takes effect even if all-unicast is on', 'rx-all-wins', {
    modes: ['ALLUNI', 'NOUNI'],
    to: OWN,
    arrives: false,
    last: Mac.all,
  }),
  passes('CTL-013', 'With NOBCAST on, no broadcast is received', 'ctrl-ignored', {
    modes: ['NOBCAST'],
    to: Mac.all,
    arrives: false,
  }),
  passes('CTL-014', 'NOBCAST takes effect even if all-multicast is on', 'rx-all-wins', {
    modes: ['ALLMULTI', 'NOBCAST'],
    to: Mac.all,
    arrives: false,
  }),
  must('CTL-015', ADDRESSES, 'The MAC filtering table is empty on reset', ['mac-table-kept'], async (bench) => {
    const first = await withModes(bench);
    if ((await passesStrangers(first)).includes(true)) {
      throw new Untestable('the device passes packets to other addresses, which it may: the table does not show');
    }
    await setTable(first, [Mac.stranger], [Mac.group]);
    const [unicast, multicast] = await passesStrangers(await withModes(bench));
    expect(!unicast && !multicast, 'packets to addresses of the table that was set before the reset arrived');
    bench.log('after a reset, packets to addresses that were in the table are not passed');
  }),
  must(
    'CTL-016',
    ADDRESSES,
    'The MAC filtering table is updated before MAC_TABLE_SET is used',
    ['ctrl-ignored'],
    async (bench) => {
      const all = await withModes(bench);
      await setTable(all, [Mac.stranger], [Mac.group]);
      const [unicast, multicast] = await passesStrangers(all);
      bench.log(`packets to the table's unicast address arrived: ${unicast}, to its multicast address: ${multicast}`);
      expect(unicast && multicast, 'packets to addresses in the table did not arrive');
    },
  ),
  must(
    'CTL-017',
    ADDRESSES,
    'mac in configuration space is updated before MAC_ADDR_SET is used',
    ['ctrl-ignored'],
    async (bench) => {
      const driver = await bench.up({ control: true, features: [Feature.CTRL_MAC_ADDR, Feature.MAC] });
      await bench.control(driver).done('MAC_ADDR_SET', ControlClass.MAC, MacCommand.ADDR_SET, Mac.stranger);
      const mac = bench.mac(bench.target);
      bench.log(`mac reads ${Buffer.from(mac).toString('hex')}`);
      expect(isEqual(mac, Mac.stranger), `mac reads ${Buffer.from(mac).toString('hex')} after the command was used`);
    },
  ),
  should(
    'CTL-018',
    ADDRESSES,
    'Packets to addresses that are neither mac nor in the MAC filtering table are dropped',
    ['rx-filter-open'],
    async (bench) => {
      const [unicast, multicast] = await passesStrangers(await withModes(bench));
      bench.log(`packets to a strange unicast address arrived: ${unicast}, to a multicast address: ${multicast}`);
      expect(!unicast && !multicast, 'packets to addresses that nobody asked for arrived');
    },
  ),
  must('CTL-019', VLANS, 'Without CTRL_VLAN, all tagged packets are received', ['vlan-always'], async (bench) => {
    const { driver, network } = await bench.network({});
    for (const id of [VLAN.wanted, 1, 4094]) {
      await network.inject(frameTo(network, undefined, id));
      await network.arrival(`a packet of VLAN ${id}`);
    }
    expect(!driver.features.has(Feature.CTRL_VLAN), 'CTRL_VLAN was negotiated');
    bench.log('packets of three VLANs arrived');
  }),
  must(
    'CTL-020',
    VLANS,
    'With CTRL_VLAN, tagged packets of VLANs in the filter table are received',
    ['ctrl-ignored'],
    async (bench) => {
      const all = await controlled(bench, { features: [Feature.CTRL_VLAN] });
      await setVlan(all, 'ADD', VLAN.wanted);
      const [wanted] = await passesVlans(all);
      expect(wanted, `a packet of VLAN ${VLAN.wanted} did not arrive`);
      bench.log(`a packet of VLAN ${VLAN.wanted} arrived`);
    },
  ),
  should(
    'CTL-021',
    VLANS,
    'With CTRL_VLAN, tagged packets of VLANs that are not in the filter table are dropped',
    ['rx-filter-open'],
    async (bench) => {
      const all = await controlled(bench, { features: [Feature.CTRL_VLAN] });
      await setVlan(all, 'ADD', VLAN.wanted);
      const [, other] = await passesVlans(all);
      expect(!other, `a packet of VLAN ${VLAN.other} arrived, which was never added`);
      await setVlan(all, 'DEL', VLAN.wanted);
      const [wanted] = await passesVlans(all);
      expect(!wanted, `a packet of VLAN ${VLAN.wanted} arrived, which was deleted`);
      bench.log('packets of VLANs that were not added, or deleted, did not arrive');
    },
  ),
  must(
    'CTL-022',
    '5.1.9.5.4.2',
    'ANNOUNCE in status is cleared before ANNOUNCE_ACK is used',
    ['announce-sticks'],
    async (bench) => {
      const driver = await bench.up({ control: true, features: [Feature.GUEST_ANNOUNCE, Feature.STATUS] });
      const announces = () => (bench.target.structures.device.read16(NetConfigField.status) & NetStatus.ANNOUNCE) !== 0;
      if (!announces()) throw new Untestable('the device has nothing to announce, and a driver cannot change that');
      const data = new Uint8Array(0);
      await bench.control(driver).done('ANNOUNCE_ACK', ControlClass.ANNOUNCE, AnnounceCommand.ACK, data);
      expect(!announces(), 'status still has ANNOUNCE after ANNOUNCE_ACK was used');
    },
  ),
];
