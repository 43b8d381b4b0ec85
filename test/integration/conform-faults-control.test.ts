import { testFaults } from './conform-support.ts';

testFaults(['PCI', 'INI', 'RST', 'ADM', 'CAP', 'OBJ', 'CTL']);
