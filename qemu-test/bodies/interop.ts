/**
 * The interoperability matrix as a scenario: our gateway on one NIC, the IPsec of the Linux kernel on another, applications
 * behind both. The gateway's NIC is QEMU's (ESP in software) or the software device (ESP in the device): the rest is the same.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { bindFunction } from '../../src/vfio/bind.ts';
import type { Guest } from '../guest/guest.ts';
import { addNamespace, Traffic } from '../guest/namespaces.ts';
import { Helper } from '../guest/process.ts';
import {
  applicationAddress,
  ENDS,
  type InteropCase,
  isExpressible,
  type MatrixPart,
  matrixPart,
  NAT_T_PORT,
  ourSa,
  type Where,
} from '../ipsec/cases.ts';
import type { GatewayAnswer } from '../ipsec/gateway.ts';
import { openEncapsulationSocket } from '../ipsec/nat-traversal.ts';
import { xfrmCommands } from '../ipsec/xfrm.ts';
import type { Scenario, ScenarioDevice } from '../scenario.ts';

const OURS_MAC = '52:54:00:00:07:01';
const KERNEL_MAC = '52:54:00:00:07:02';
const GATEWAY = 'qemu-test/ipsec/gateway.js';
const APPLICATION = 'app';
const TUN = 'tun0';
/** The smallest that IPv6 allows: no transform makes a packet of it that does not fit 1500. */
const TUN_MTU = 1280;
/** What crosses in each case, each way. */
const AMOUNT = { pings: 2, sizes: [1, 64, 500, 1200], bytes: 48 * 1024 } as const;
const SETTLE_MS = 30_000;
const SETTLE_STEP_MS = 100;
const GATEWAY_CLOSES = 'the gateway closes its NIC';

export interface InteropOptions {
  /** They run one after the other in one guest. */
  readonly parts: readonly MatrixPart[];
  readonly where: Where;
}

export function interopScenario({ parts, where }: InteropOptions): Scenario {
  const cases = parts.flatMap((part) => matrixPart(part, where));
  const kernel = { kind: 'virtio-net', id: 'kernel', mac: KERNEL_MAC, iommu: false } as const;
  const devices: ScenarioDevice[] =
    where === 'software'
      ? [
          { kind: 'virtio-net', id: 'ours', mac: OURS_MAC, iommu: true, link: { hub: 0 } },
          { ...kernel, link: { hub: 0 } },
        ]
      : [
          { kind: 'vfio-user', id: 'ours', link: 'wire', args: ['--mac', OURS_MAC] },
          { ...kernel, link: { device: 'ours' } },
        ];
  return {
    title: `IPsec interop with Linux XFRM, ${where}: ${parts.join(', ')}; ${cases.length} cases`,
    machine: { qemu: where === 'software' ? 'stock' : 'vfioUser', memory: 1536 },
    devices,
    modules: [
      'virtio_pci',
      'virtio_net',
      'vfio_pci',
      'vfio_iommu_type1',
      'tun',
      'xfrm_user',
      'esp4',
      'esp6',
      'ah4',
      'ah6',
    ],
    timeout: 180 + 8 * cases.length,
    checks: [...cases.map(({ name }) => name), GATEWAY_CLOSES],
    guest: (guest) => runMatrix(guest, cases, where),
  };
}

async function runMatrix(guest: Guest, cases: readonly InteropCase[], where: Where): Promise<void> {
  const address = guest.address('ours');
  bindFunction(address);
  addNamespace(guest, APPLICATION);
  const [gateway, kernelSide, ourSide] = await Promise.all([
    Helper.start('the gateway', guest.nodeCommand(GATEWAY, [address, KERNEL_MAC])),
    Traffic.start(guest, null),
    Traffic.start(guest, APPLICATION),
  ]);
  setUpNetwork(guest);
  const closeNatTraversal = openEncapsulationSocket(NAT_T_PORT);
  for (const [index, item] of cases.entries()) {
    await guest.check(item.name, () => runCase(guest, item, index, { gateway, kernelSide, ourSide, where }));
  }
  await guest.check(GATEWAY_CLOSES, async () => {
    await ask(gateway, { kind: 'close' });
  });
  kernelSide.stop();
  ourSide.stop();
  closeNatTraversal();
  // What is not on an interface of this scenario's, and so would stay.
  guest.must('ip -batch -', 'xfrm state flush\nxfrm policy flush\naddr flush dev lo scope global\n');
}

interface Sides {
  readonly gateway: Helper;
  readonly kernelSide: Traffic;
  readonly ourSide: Traffic;
  readonly where: Where;
}

async function runCase(guest: Guest, item: InteropCase, index: number, sides: Sides): Promise<string> {
  const { gateway, kernelSide, ourSide, where } = sides;
  // Our side falls silent first, so that no packet of the case before meets the kernel's new states.
  await ask(gateway, { kind: 'clear' });
  const errorsBefore = guest.read('/proc/net/xfrm_stat');
  guest.must('ip -batch -', `${xfrmCommands(item, index).join('\n')}\n`);
  const { placement = [] } = await ask(gateway, {
    kind: 'sas',
    outbound: ourSa(item, index, 'ours'),
    inbound: ourSa(item, index, 'kernel'),
  });
  const place = where === 'inline' && isExpressible(item) ? 'inline' : 'software';
  if (placement.length !== 2 || placement.some((text) => !text.startsWith(`${place}:`))) {
    throw new Error(`the SAs are not ${place}: ${placement.join('; ')}`);
  }
  const ours = applicationAddress('ours', item);
  const kernel = applicationAddress('kernel', item);
  // Both directions at once, as between any two hosts: a guest under emulation is slow with each wait of its own.
  await Promise.all([
    ourSide.request({ kind: 'all', to: kernel, ...AMOUNT }),
    kernelSide.request({ kind: 'all', to: ours, ...AMOUNT }),
  ]);
  await settle(guest, gateway, errorsBefore);
  return [...new Set(placement)].join('; ');
}

/**
 * Every packet that one side protected, the other has opened, and none came in the clear. The last ones (an acknowledgement, a
 * FIN) may still be on their way.
 */
async function settle(guest: Guest, gateway: Helper, errorsBefore: string): Promise<void> {
  for (let waited = 0; ; waited += SETTLE_STEP_MS) {
    const { report } = await ask(gateway, { kind: 'report' });
    if (report === undefined) throw new Error('the gateway reports nothing');
    const { opened, protected: sent, inTheClear, dropped } = report;
    const kernel = kernelPackets(guest);
    const errors = guest.read('/proc/net/xfrm_stat');
    if (errors !== errorsBefore) throw new Error(`the kernel counts errors: ${changes(errorsBefore, errors)}`);
    const statistics = `/sys/class/net/${guest.interface('kernel')}/statistics`;
    const wire = ['rx_packets', 'tx_packets'].map((name) => guest.read(`${statistics}/${name}`));
    const counts = JSON.stringify({ ...report, kernel, wire });
    if (inTheClear !== 0 || Object.keys(dropped).length > 0) throw new Error(`not all went well: ${counts}`);
    if (opened > 0 && sent > 0 && kernel.includes(opened) && kernel.includes(sent)) return;
    if (waited >= SETTLE_MS) throw new Error(`the counts of both sides differ: ${counts}`);
    await sleep(SETTLE_STEP_MS);
  }
}

/** Packets that each of the kernel's states has processed. */
function kernelPackets(guest: Guest): number[] {
  const states = guest.must('ip -s xfrm state');
  return [...states.matchAll(/lifetime current:\s+\d+\(bytes\), (\d+)\(packets\)/g)].map((match) => Number(match[1]));
}

/** The lines of xfrm_stat (Documentation/networking/xfrm_proc.rst) that are different now. */
function changes(before: string, after: string): string {
  const old = before.split('\n');
  return after
    .split('\n')
    .filter((line) => !old.includes(line))
    .map((line) => line.trim().replace(/\s+/, ' '))
    .join(', ');
}

async function ask(gateway: Helper, request: object): Promise<Extract<GatewayAnswer, { ok: true }>> {
  const answer = await gateway.request(request);
  if (!isAnswer(answer)) throw new Error('the gateway sent something else');
  if (!answer.ok) throw new Error(`the gateway: ${answer.detail}`);
  return answer;
}

function isAnswer(message: unknown): message is GatewayAnswer {
  return typeof message === 'object' && message !== null && 'ok' in message;
}

function setUpNetwork(guest: Guest): void {
  const { ours, kernel } = ENDS;
  const nic = guest.interface('kernel');
  const lines = [
    `link set ${nic} up`,
    `addr add ${kernel.outer[4]}/24 dev ${nic}`,
    `addr add ${kernel.outer[6]}/64 dev ${nic} nodad`,
    `addr add ${kernel.inner[4]}/32 dev lo`,
    `addr add ${kernel.inner[6]}/128 dev lo nodad`,
    `neigh add ${ours.outer[4]} lladdr ${OURS_MAC} dev ${nic}`,
    `neigh add ${ours.outer[6]} lladdr ${OURS_MAC} dev ${nic}`,
    `route add ${ours.inner[4]}/32 via ${ours.outer[4]} dev ${nic} src ${kernel.inner[4]}`,
    `route add ${ours.inner[6]}/128 via ${ours.outer[6]} dev ${nic} src ${kernel.inner[6]}`,
    `link set ${TUN} netns ${APPLICATION}`,
  ];
  guest.must('ip -batch -', `${lines.join('\n')}\n`);
  const inside = [`link set ${TUN} mtu ${TUN_MTU} up`];
  for (const family of [4, 6] as const) {
    const [bits, nodad] = family === 4 ? [32, ''] : [128, ' nodad'];
    for (const place of ['inner', 'outer'] as const) {
      inside.push(
        `addr add ${ours[place][family]}/${bits} dev ${TUN}${nodad}`,
        `route add ${kernel[place][family]}/${bits} dev ${TUN} src ${ours[place][family]}`,
      );
    }
  }
  guest.must(`ip -n ${APPLICATION} -batch -`, `${inside.join('\n')}\n`);
}
